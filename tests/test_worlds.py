"""One recipe on any number of processes, sharded or not: the same windows, the same curve, and the same bits after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm import checkpoint
from tests.forks import digest, run_group, train, write_recipe, write_text

NODE = 2  # processes of a node, for hybrid
LAYOUTS = [(1, "none"), (2, "none"), (4, "none"), (2, "full"), (4, "full"), (4, "hybrid")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def losses(folder: Path, run: str = "tiny") -> list[float]:
    lines = map(json.loads, (folder / "runs" / run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def go(folder: Path, recipe: Path, world: int, shard: str, status: int = 0, **options: Any) -> None:
    """Run on that world; the record of the run says how many processes there truly were."""
    overrides = options.pop("overrides", ())
    node = NODE if shard == "hybrid" else 0
    folder.mkdir(exist_ok=True)
    for each in run_group(train(recipe, f"machine.shard={shard}", *overrides, **options), folder, world, node):
        assert each.status == status, each.err
    newest = checkpoint.newest(folder / "runs/tiny", print)
    assert newest is not None
    assert newest.manifest["machine"]["world"] == world and newest.manifest["machine"]["machine.shard"] == shard


# AdamW's update is smooth in the gradient; Muon's orthogonalisation amplifies the rounding of the sums.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-4)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_curve_is_the_same_on_any_world_and_layout(
    tmp_path: Path, text: Path, optimizer: str, tolerance: float, tied: bool
) -> None:
    changes = {"train.optimizer": optimizer, "model.tied": tied, "train.steps": 50, "train.learning_rate": 0.003}
    recipe = write_recipe(tmp_path, text, **changes, **{"machine.micro_batch": "auto", "checkpoint.every": 50})
    for world, shard in LAYOUTS:
        folder = tmp_path / f"{world}-{shard}"
        go(folder, recipe, world, shard)
        curve = losses(folder)
        assert len(curve) == 50 and curve[-1] < curve[0]
        assert curve == pytest.approx(losses(tmp_path / "1-none"), rel=tolerance)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(("world", "shard"), LAYOUTS[1:])
def test_a_group_that_is_stopped_ends_in_the_same_bits(
    tmp_path: Path, text: Path, optimizer: str, world: int, shard: str
) -> None:
    """The signal goes to every process here; that it may go to any one is shown elsewhere."""
    recipe = write_recipe(tmp_path, text, **{"train.optimizer": optimizer, "machine.micro_batch": 1})
    go(tmp_path / "whole", recipe, world, shard)
    for stop in (1, 7):
        go(tmp_path / "parts", recipe, world, shard, status=75, stop_after=stop)
    go(tmp_path / "parts", recipe, world, shard)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_opens_on_any_other_world_and_layout(tmp_path: Path, text: Path, tied: bool) -> None:
    """Saved on one layout and gone on with on the next, the curve is the undisturbed one's; what is loaded is what was saved."""
    recipe = write_recipe(
        tmp_path, text, **{"machine.micro_batch": "auto", "model.tied": tied, "train.learning_rate": 0.003}
    )
    go(tmp_path / "whole", recipe, 1, "none")
    for stop, (world, shard) in zip(
        (2, 4, 6, 8, 10), [(2, "full"), (1, "none"), (4, "full"), (2, "none"), (4, "hybrid")], strict=True
    ):
        go(tmp_path / "parts", recipe, world, shard, status=75, stop_after=stop)
    go(tmp_path / "parts", recipe, 2, "full")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_only_the_main_process_speaks(tmp_path: Path, text: Path) -> None:
    first, second = run_group(train(write_recipe(tmp_path, text)), tmp_path, 2)
    assert "12 steps" in first.out and "2 x 1 threads" in first.out
    assert second.out == "" and second.err == ""
