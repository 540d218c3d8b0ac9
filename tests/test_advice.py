"""What is advised follows from the text, the recipe and what came of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm import advice
from llm.recipe import Recipe, Text, Train, load, resolve, with_steps
from tests.forks import run, script, train, write_recipe, write_text

TOKENS = 1_000_000


def recipe(epochs: float, **model: Any) -> Recipe:
    given = Recipe(run="tiny", text=Text(files=("-",)), train=Train(epochs=epochs))
    return with_steps(resolve(replace(given, model=replace(given.model, **model))), TOKENS)


@pytest.mark.parametrize(
    ("epochs", "model", "vocabulary", "words"),
    [
        (0.5, {}, 4096, "train.epochs=4"),
        (20, {}, 4096, "model.dropout=auto"),
        (6, {"dim": 64, "layers": 2}, 4096, "tokenizer.vocabulary=2048"),
        (20, {"dropout": 0.1, "dim": 64, "layers": 4}, 512, "a larger model"),
        (6, {}, 1024, "more text"),
    ],
)
def test_a_text_is_told_what_it_allows(epochs: float, model: dict[str, Any], vocabulary: int, words: str) -> None:
    allows, change = advice.of_text(recipe(epochs, **model), TOKENS, vocabulary).splitlines()
    assert "1.00 M unique tokens" in allows and "in the vocabulary" in allows and f"read {epochs:.2f} times" in allows
    assert words in change


def evaluations(*bits: float, gap: float) -> list[dict[str, Any]]:
    return [
        {"step": 100 * n, "epochs_seen": 5.0 * n, "bits_per_byte": b, "val_loss": 3.0, "train_loss": 3.0 - gap}
        for n, b in enumerate(bits, 1)
    ]


def test_a_run_that_got_worse_is_told_from_when_on_and_what_would_help() -> None:
    said = advice.of_run(recipe(20), evaluations(1.5, 1.4, 1.45, gap=1.0))
    assert "stopped paying after step 200, epoch 10.00: 1.4000" in said and "1.4500 now" in said
    assert "more text" in said and "model.dropout" in said
    assert "model.dropout" not in advice.of_run(recipe(20, dropout=0.1), evaluations(1.5, 1.4, 1.45, gap=1.0))


def test_a_run_that_fell_to_its_end_is_told_to_go_on() -> None:
    assert "a longer run" in advice.of_run(recipe(1), evaluations(1.5, 1.4, gap=0.1))


def test_prepare_ends_with_advice_and_a_run_too(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    prepared = run(script("module:llm.prepare", path), tmp_path)
    assert prepared.status == 0, prepared.err
    assert "unique tokens" in prepared.out.splitlines()[-2] and "help most" in prepared.out.splitlines()[-1]
    trained = run(train(path), tmp_path)
    assert trained.status == 0, trained.err
    assert "what would help: " in trained.out and "epochs seen" in trained.out and "(training " in trained.out
    assert load(tmp_path / "runs/tiny/recipe.yaml").train.steps == 12
