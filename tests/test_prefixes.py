"""Embeddings move with those of their prefixes in runs with Muon, and such a run resumes to the bit at any step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm.data import hf_tokenizer
from llm.optim import optimizer
from tests.forks import digest, run, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def watched(act: Callable[[], None], steps: int = 6) -> Callable[[], None]:
    """Training that shares during `steps` updates, and writes the prefixes to prefixes.txt."""

    def share(self: optimizer.Optimizer, prefixes: torch.Tensor) -> None:
        Path("prefixes.txt").write_text(" ".join(map(str, prefixes.tolist())))
        self.prefixes = prefixes

    def run_watched() -> None:
        optimizer.PREFIX_STEPS = steps
        optimizer.Optimizer.share_with_prefixes = share  # type: ignore[method-assign]
        act()

    return run_watched


def test_a_run_shares_by_its_own_tokenizer_and_stopped_at_any_step_it_ends_in_the_same_bits(
    text: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    recipe = write_recipe(tmp_path, text)
    assert run(watched(train(recipe)), whole).status == 0
    found = list(map(int, (whole / "prefixes.txt").read_text().split()))
    assert found == hf_tokenizer.load(whole / "runs/tiny/tokenizer").prefixes() and max(found) > 0
    for stop in (2, 5, 6, 9):
        assert run(watched(train(recipe, stop_after=stop)), parts).status == 75
    assert run(watched(train(recipe)), parts).status == 0
    assert digest(parts) == digest(whole)
    other = tmp_path / "other"
    other.mkdir()
    assert run(watched(train(recipe), steps=5), other).status == 0
    assert digest(other) != digest(whole)


@pytest.mark.parametrize(
    "changes", [{"train.optimizer": "adamw"}, {"model.tied": "false"}, {"model.from": "base"}], ids=str
)
def test_other_runs_do_not_share(text: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    if "model.from" in changes:
        base = tmp_path / "base"
        base.mkdir()
        assert run(train(write_recipe(base, text)), base).status == 0
        changes = {"model.from": str(base / "runs/tiny/checkpoints/step-000012")}
        changes |= dict.fromkeys(("model.dim", "model.layers", "model.heads", "tokenizer.vocabulary"))  # type: ignore[arg-type]
    ended = run(watched(train(write_recipe(tmp_path, text, **changes))), tmp_path)
    assert ended.status == 0, ended.err
    assert not (tmp_path / "prefixes.txt").exists()
