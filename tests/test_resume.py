"""A run that was stopped and started again is the run that was never stopped, to the bit."""

import json
from pathlib import Path

import pytest
import torch

from tests.forks import Ended, digest, run, run_group, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=20)


def done(ended: Ended) -> None:
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_stopped_after_any_step_it_ends_in_the_same_bits(tmp_path: Path, text: Path, optimizer: str) -> None:
    """Dropout on, two micro-batches a step, over an epoch's end and evaluations; every step but the last is stopped at."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    recipe = write_recipe(
        tmp_path, text, **{"train.optimizer": optimizer, "train.tokens_per_step": 384, "machine.micro_batch": 12}
    )
    done(run(train(recipe), tmp_path / "whole"))
    for step in range(1, 12):
        stopped = run(train(recipe, stop_after=step), tmp_path / "parts")
        assert stopped.status == 75, stopped.err
        assert f"after step {step} of 12" in stopped.err
    done(run(train(recipe), tmp_path / "parts"))
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    records = [(tmp_path / name / "runs/tiny/metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert max(json.loads(line).get("epoch", 0) for line in records[0]) > 1
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line] for lines in records]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 13))


@pytest.mark.parametrize("start", ["model.from=runs/tiny/best", "from=tiny/step-000012"])
def test_stopped_before_its_first_step_it_has_the_same_curve(tmp_path: Path, text: Path, start: str) -> None:
    """The weights that it begins with are not its own: they are no best of it."""
    recipe = write_recipe(tmp_path, text, **{"train.decay": 0, "evaluate.every": 6})
    done(run(train(recipe), tmp_path))
    later = [start, "train.steps=24", "train.learning_rate=0.5"]
    done(run(train(recipe, *later, "run=whole"), tmp_path))
    assert run(train(recipe, *later, "run=parts", "machine.stop_after=0.0001s"), tmp_path).status == 75
    done(run(train(recipe, *later, "run=parts"), tmp_path))
    results = []
    for name in ("whole", "parts"):
        checkpoints = tmp_path / "runs" / name / "checkpoints"
        manifest = json.loads((checkpoints / "step-000024/checkpoint.json").read_text())
        results.append({key: manifest[key] for key in ("best", "curve", "metrics")})
    assert results[0] == results[1] and digest(tmp_path, "whole") == digest(tmp_path, "parts")


def test_how_often_it_looks_at_itself_changes_no_bit(tmp_path: Path, text: Path) -> None:
    """Evaluation, samples, logging and checkpoints on another cadence, and another one again after a stop."""
    recipe = write_recipe(tmp_path, text)
    cadences: dict[str, list[str]] = {
        "often": ["evaluate.every=1", "evaluate.prompts=[My self Har,The]", "tracking.every=1", "checkpoint.every=1"],
        "never": ["evaluate.every=99", "tracking.every=99", "checkpoint.every=99", "checkpoint.keep=1"],
        "odd": ["evaluate.every=7", "evaluate.prompts=[The]", "tracking.every=5", "checkpoint.every=3"],
    }
    for name, overrides in cadences.items():
        (tmp_path / name).mkdir()
        done(run(train(recipe, *overrides), tmp_path / name))
    (tmp_path / "mixed").mkdir()
    for stop, overrides in zip((3, 4, 9), cadences.values(), strict=True):
        assert run(train(recipe, *overrides, stop_after=stop), tmp_path / "mixed").status == 75
    done(run(train(recipe), tmp_path / "mixed"))
    assert len({digest(tmp_path / name) for name in [*cadences, "mixed"]}) == 1


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bf16")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_in_bf16_too_a_stopped_run_ends_in_the_same_bits(
    tmp_path: Path, text: Path, optimizer: str, world: int
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    recipe = write_recipe(tmp_path, text, **{"machine.precision": "bf16", "train.optimizer": optimizer})
    for each in run_group(train(recipe), tmp_path / "whole", world):
        done(each)
    for stop in (3, 7):
        assert {each.status for each in run_group(train(recipe, stop_after=stop), tmp_path / "parts", world)} == {75}
    for each in run_group(train(recipe), tmp_path / "parts", world):
        done(each)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    said = (tmp_path / "parts" / ("out.txt" if world == 1 else "out-0.txt")).read_text()
    assert "bf16" in said and f"{world} x 1 threads" in said
