"""One recipe on any number of processes: the same windows, the same curve, and on one world the same bits after a stop."""

import json
from pathlib import Path

import pytest

from tests.forks import digest, run_group, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def losses(folder: Path, run: str = "tiny") -> list[float]:
    lines = map(json.loads, (folder / "runs" / run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


# AdamW's update is smooth in the gradient; Muon's orthogonalisation amplifies the rounding of the sums.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_the_curve_is_the_same_on_1_2_and_4_processes(tmp_path: Path, text: Path, optimizer: str, tolerance: float) -> None:
    changes = {"train.optimizer": optimizer, "train.steps": 30, "train.learning_rate": 0.003, "machine.micro_batch": "auto"}
    curves = {}
    for world in (1, 2, 4):
        (folder := tmp_path / str(world)).mkdir()
        for each in run_group(train(write_recipe(folder, text, **changes)), folder, world):
            assert each.status == 0, each.err
        machine = json.loads((folder / "runs/tiny/machine.json").read_text())
        assert machine["world"] == world
        curves[world] = losses(folder)
        assert len(curves[world]) == 30
    for world in (2, 4):
        assert curves[world] == pytest.approx(curves[1], rel=tolerance)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_stopped_end_in_the_same_bits(tmp_path: Path, text: Path, optimizer: str) -> None:
    """The signal goes to every process here; that it may go to any one is shown elsewhere."""
    recipe = write_recipe(tmp_path, text, **{"train.optimizer": optimizer, "machine.micro_batch": 1})
    for name, stops in (("whole", []), ("parts", [1, 2, 7])):
        (folder := tmp_path / name).mkdir()
        for stop in stops:
            assert [each.status for each in run_group(train(recipe, stop_after=stop), folder, 2)] == [75, 75]
        assert [each.status for each in run_group(train(recipe), folder, 2)] == [0, 0]
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_only_the_main_process_speaks(tmp_path: Path, text: Path) -> None:
    first, second = run_group(train(write_recipe(tmp_path, text)), tmp_path, 2)
    assert "12 steps" in first.out and "2 x 1 threads" in first.out
    assert second.out == "" and second.err == ""
