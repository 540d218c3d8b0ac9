"""What is advised follows from the text, the recipe and what came of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm.config.reading import load
from llm.config.resolving import resolve, with_steps
from llm.config.schema import Recipe, Text, Train
from llm.insight import hints
from llm.run_folder.metrics import Tracker
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
        (6, {"dim": 64, "layers": 2}, 4096, "more text"),  # more pieces won in every table of recipes/README.md
        (20, {"dropout": 0.1, "dim": 64, "layers": 4}, 512, "a larger model"),
        (6, {}, 1024, "more text"),
        (200, {"dropout": 0.1}, 4096, "more text"),  # a larger model than text would learn it by heart
    ],
)
def test_a_text_is_told_what_it_allows(epochs: float, model: dict[str, Any], vocabulary: int, words: str) -> None:
    allows, change = hints.of_text(recipe(epochs, **model), TOKENS, vocabulary).splitlines()
    assert "1.00 M unique tokens" in allows and "in the vocabulary" in allows and f"read {epochs:.2f} times" in allows
    assert words in change


def evaluations(*bits: float, gap: float) -> list[dict[str, Any]]:
    return [
        {"step": 100 * n, "epochs_seen": 5.0 * n, "bits_per_byte": b, "val_loss": 3.0, "train_loss": 3.0 - gap}
        for n, b in enumerate(bits, 1)
    ]


def test_a_run_that_got_worse_is_told_from_when_on_and_what_would_help() -> None:
    said = hints.of_run(recipe(20), evaluations(1.5, 1.4, 1.45, gap=1.0))
    assert "stopped paying after step 200, epoch 10.00: 1.4000" in said and "1.4500 now" in said
    assert "more text" in said and "model.dropout" in said
    assert "model.dropout" not in hints.of_run(recipe(20, dropout=0.1), evaluations(1.5, 1.4, 1.45, gap=1.0))


def test_a_run_that_fell_to_its_end_is_told_to_go_on() -> None:
    assert "a longer run" in hints.of_run(recipe(1), evaluations(1.5, 1.4, gap=0.1))


def test_one_evaluation_shows_no_trend() -> None:
    said = hints.of_run(recipe(1), evaluations(1.5, gap=0.1))
    assert "fell" not in said and "stopped paying" not in said and "evaluate.every=25" in said
    assert "more text" in hints.of_run(recipe(1), evaluations(1.5, gap=1.0))


@pytest.mark.parametrize(
    ("epochs", "decay", "gap", "words"),
    [
        (5.0, 0.6, 1.0, "more text, or a run of train.epochs=5"),  # dropout cost bits in five epochs
        (5.0, 0.0, 0.1, "a rate that falls for longer: train.decay=60%"),
        (5.0, 0.6, 0.1, "a larger model"),  # not a longer run, which has just been of no use
    ],
)
def test_a_run_that_got_worse_is_told_what_the_tables_bear(epochs: float, decay: float, gap: float, words: str) -> None:
    given = recipe(epochs)
    given = replace(given, train=replace(given.train, decay=decay))
    said = hints.of_run(given, [*evaluations(1.4, gap=gap), {**evaluations(1.45, gap=gap)[0], "step": 200}])
    assert said.endswith(f"what would help: {words}"), said


def test_the_training_loss_beside_an_evaluation_is_a_recent_one(tmp_path: Path) -> None:
    """Of the last tenth of the steps; the mean since the last evaluation would hide how far training is ahead."""
    given = recipe(1)
    tracker = Tracker(tmp_path, given, 0, {})
    rest = {"learning_rate": 0.0, "gradient_norm": 0.0, "tokens_per_second": 1.0, "epoch": 0.0, "seconds_left": 0.0}
    for step in range(10, 210, 10):
        tracker.log(step, loss=9.0 if step < 190 else 2.0 + step / 200, **rest)
    tracker.log(200, val_loss=3.6, bits_per_byte=1.0, best=True, epochs_seen=9.0)
    tracker.close()
    assert tracker.evaluations[0]["train_loss"] == pytest.approx(2.975)
    again = Tracker(tmp_path, given, 190, {})  # resumed: from the record
    again.log(200, val_loss=3.6, bits_per_byte=1.0, best=True, epochs_seen=9.0)
    again.close()
    assert again.evaluations[0]["train_loss"] == pytest.approx(2.95)


def test_prepare_ends_with_advice_and_a_run_too(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    prepared = run(script("module:llm.prepare", path), tmp_path)
    assert prepared.status == 0, prepared.err
    assert "unique tokens" in prepared.out.splitlines()[-2] and "help most" in prepared.out.splitlines()[-1]
    trained = run(train(path), tmp_path)
    assert trained.status == 0, trained.err
    assert "what would help: " in trained.out and "epochs seen" in trained.out and "(training " in trained.out
    assert load(tmp_path / "runs/tiny/recipe.yaml").train.steps == 12
