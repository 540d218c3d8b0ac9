"""One recipe on any number of processes, sharded or not: the same windows, the same curve, and the same bits after a stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.distributed.sharding import Sharding
from llm.run_folder import checkpoint
from tests.forks import digest, run, run_group, train, write_recipe, write_text

NODE = 2  # processes of a node, for hybrid
LAYOUTS = [(1, "none"), (2, "none"), (4, "none"), (2, "full"), (4, "full"), (4, "hybrid")]
FAST = [(1, "none"), (2, "none"), (2, "full")]


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


def dealt_to_itself(act: Callable[[], None]) -> Callable[[], None]:
    """The act, in a group of one process: what machine.shard asks for is done by the engine as among many."""

    def alone() -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(0)
        Sharding.MIN_PROCESSES = 1
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        act()

    return alone


# AdamW's update is smooth in the gradient; Muon's orthogonalisation amplifies the rounding of the sums.
TOLERANCES = {"adamw": 1e-5, "muon": 1e-4}


def one_curve(folder: Path, text: Path, optimizer: str, tied: bool, steps: int, layouts: list[tuple[int, str]]) -> None:
    """Dropout is on, and the micro-batch is another one on each world."""
    changes = {"train.optimizer": optimizer, "model.tied": tied, "train.steps": steps, "train.learning_rate": 0.003}
    recipe = write_recipe(folder, text, **changes, **{"machine.micro_batch": "auto", "checkpoint.every": steps})
    for world, shard in layouts:
        go(folder / f"{world}-{shard}", recipe, world, shard)
        curve = losses(folder / f"{world}-{shard}")
        assert len(curve) == steps and curve[-1] < curve[0]
        assert curve == pytest.approx(losses(folder / "1-none"), rel=TOLERANCES[optimizer])


@pytest.mark.parametrize(("optimizer", "tied"), [("muon", True), pytest.param("adamw", False, marks=pytest.mark.slow)])
def test_the_curve_is_the_same_on_1_and_2_processes(tmp_path: Path, text: Path, optimizer: str, tied: bool) -> None:
    one_curve(tmp_path, text, optimizer, tied, 30, FAST)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_more_processes_than_rows_are_one_curve(tmp_path: Path, text: Path, optimizer: str) -> None:
    """Norms of six numbers, dealt to four in pairs: one process holds none of them."""
    changes = {"model.dim": 12, "train.optimizer": optimizer, "machine.micro_batch": 1, "train.steps": 6}
    recipe = write_recipe(tmp_path, text, **changes)
    for world, shard in ((1, "none"), (4, "full")):
        go(tmp_path / shard, recipe, world, shard)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "none"), rel=TOLERANCES[optimizer])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_process_that_deals_rows_to_itself_ends_in_the_bits_of_one_that_does_not(
    tmp_path: Path, text: Path, optimizer: str
) -> None:
    recipe = write_recipe(tmp_path, text, **{"train.optimizer": optimizer, "machine.shard": "full"})
    for name, act in {"whole": train(recipe), "dealt": dealt_to_itself(train(recipe))}.items():
        (tmp_path / name).mkdir()
        ended = run(act, tmp_path / name)
        assert ended.status == 0, ended.err
    assert digest(tmp_path / "dealt") == digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_curve_is_the_same_on_any_world_and_layout(tmp_path: Path, text: Path, optimizer: str, tied: bool) -> None:
    one_curve(tmp_path, text, optimizer, tied, 50, LAYOUTS)


def same_bits(folder: Path, text: Path, optimizer: str, world: int, shard: str, stops: list[int]) -> None:
    """The signal goes to every process here; that it may go to any one is shown elsewhere."""
    recipe = write_recipe(folder, text, **{"train.optimizer": optimizer, "machine.micro_batch": 1})
    go(folder / "whole", recipe, world, shard)
    for stop in stops:
        go(folder / "parts", recipe, world, shard, status=75, stop_after=stop)
    go(folder / "parts", recipe, world, shard)
    assert digest(folder / "parts") == digest(folder / "whole")


@pytest.mark.parametrize(("world", "shard"), [pytest.param(2, "none", marks=pytest.mark.slow), (2, "full")])
def test_two_processes_that_are_stopped_end_in_the_same_bits(
    tmp_path: Path, text: Path, world: int, shard: str
) -> None:
    same_bits(tmp_path, text, "muon", world, shard, [7])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(("world", "shard"), LAYOUTS)
def test_stopped_at_every_step_any_world_ends_in_the_same_bits(
    tmp_path: Path, text: Path, optimizer: str, world: int, shard: str
) -> None:
    same_bits(tmp_path, text, optimizer, world, shard, list(range(1, 11)))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_opens_on_any_other_world_and_layout(tmp_path: Path, text: Path, tied: bool) -> None:
    """Saved on one layout and gone on with on the next, the curve is the undisturbed one's."""
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


def test_a_micro_batch_that_does_not_fit_the_world_is_refused_in_one_line(tmp_path: Path, text: Path) -> None:
    first, second = run_group(train(write_recipe(tmp_path, text), "machine.micro_batch=4"), tmp_path, 2)
    assert first.status == second.status == 2
    assert "machine.micro_batch = 4 on 2 processes: try 2" in first.err and len(first.err.splitlines()) == 1
    assert second.err == ""
