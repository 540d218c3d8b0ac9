"""A run that was stopped and started again is the run that was never stopped, to the bit."""

import json
from pathlib import Path

import pytest

from tests.forks import Ended, digest, run, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=20)


def done(ended: Ended) -> None:
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopped_after_any_step_it_ends_in_the_same_bits(tmp_path: Path, text: Path, optimizer: str) -> None:
    """Dropout on, two micro-batches a step, over an epoch's end and evaluations; every step but the last is stopped at."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    recipe = write_recipe(tmp_path, text, **{"train.optimizer": optimizer, "train.tokens_per_step": 256, "machine.micro_batch": 8})
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
