"""What is advised follows from the text, the recipe and what came of it."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llm
from llm.config.reading import load
from llm.config.resolving import with_steps, with_vocabulary
from llm.config.schema import Recipe, TextSource
from llm.insight import hints
from llm.run_folder.metrics import Tracker
from tests.forks import run, script, train, write_recipe, write_text
from tests.tiny import with_last_length

TOKENS = 1_000_000


def recipe(epochs: float, *changes: str) -> Recipe:
    """quickstart with another length and `changes`, as it is resolved for a text of TOKENS tokens."""
    return sized(llm.load_recipe("quickstart", with_last_length([f"train.epochs={epochs}", *changes])))


def sized(given: Recipe) -> Recipe:
    return with_vocabulary(with_steps(given, TOKENS), 16384)


# (overrides of quickstart, epochs, the rule that speaks, a part of the change it names)
WRONG = [
    ("train.optimizer=adamw train.learning_rate=3e-4", 1, "optimizer", "train.optimizer=muon"),
    ("train.learning_rate=0.3", 1, "rate", "train.learning_rate=0.02"),
    ("train.learning_rate=1e-3", 1, "rate", "train.learning_rate=0.02"),
    ("train.warmup=150 train.decay=40%", 1, "warmup", "train.warmup=24"),
    ("train.tokens_per_step=32768 train.warmup=0", 1, "batch", "train.tokens_per_step=1280"),
    ("train.decay=0", 1, "decay", "train.decay=60%"),
    ("train.weight_decay=0", 6, "forgetting", "train.weight_decay=auto"),
    ("train.weight_decay=5", 6, "forgetting", "train.weight_decay=auto"),
    ("model.dropout=0.1", 2, "dropout", "model.dropout=0"),
    ("model.dim=32 model.heads=1 tokenizer.vocabulary=1024 train.tokens_per_step=1024", 4, "width", "model.dim=64 model.heads=2"),
    ("model.dim=512 model.heads=8 model.layers=12", 0.2, "width", "model.dim=256 model.heads=4"),
    ("tokenizer.vocabulary=2048", 1, "pieces", "tokenizer.vocabulary=8192"),
    ("tokenizer.vocabulary=65536", 3, "fewer_pieces", "tokenizer.vocabulary=auto"),
    ("", 0.5, "longer", "train.epochs=1"),
    ("", 6, "more_text", "text.files=[wiki-leads,MORE.txt]"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "epochs", "rule", "change"), WRONG)
def test_each_rule_names_a_change_that_can_be_made(wrong: str, epochs: float, rule: str, change: str) -> None:
    given = recipe(epochs, *wrong.split())
    facts = hints.Facts(given, given.tokenizer.vocabulary, TOKENS, given.train.steps)
    found, hint = hints.advise(facts)
    assert found == rule and change in " ".join(hint.change), hint
    allows, said = hints.of_text(given, TOKENS, given.tokenizer.vocabulary).splitlines()
    assert (
        "1.00 M unique tokens" in allows
        and "in the vocabulary" in allows
        and f"read {facts.epochs:.2f} times" in allows
    )
    assert said.endswith(str(hint))


@pytest.mark.parametrize(
    "first", [each[0] for each in WRONG] + [" ".join(each[0] for each in WRONG[i : i + 3]) for i in (2, 5, 8)]
)
def test_advice_that_is_followed_comes_to_an_end(first: str) -> None:
    """Each change is an override that `load` takes as it is, and after it another rule speaks, or none."""
    overrides, spoken = ["train.epochs=0.7", *first.split()], []
    for _ in range(14):
        given = sized(llm.load_recipe("quickstart", with_last_length(overrides)))
        rule, hint = hints.advise(hints.Facts(given, given.tokenizer.vocabulary, TOKENS, given.train.steps))
        if rule == "more_text":
            break
        spoken.append(rule)
        overrides += hint.change
    assert rule == "more_text", spoken
    assert all(spoken.count(each) == 1 or each in ("longer", "width") for each in spoken), spoken


def evaluations(*bits: float, gap: float, epochs: float) -> list[dict[str, Any]]:
    """At equal distances up to this number of epochs of TOKENS tokens, with training ahead by `gap` nats."""
    steps = epochs * TOKENS / 2048
    return [
        {
            "step": steps * n / len(bits),
            "epochs_seen": epochs * n / len(bits),
            "bits_per_byte": b,
            "val_loss": 3.0,
            "train_loss": 3.0 - gap,
        }
        for n, b in enumerate(bits, 1)
    ]


def test_a_run_that_got_worse_is_told_from_when_on_and_what_would_help() -> None:
    said = hints.of_run(recipe(20), evaluations(1.5, 1.4, 1.45, gap=1.0, epochs=15))
    assert "stopped paying after step 4,882.8125, epoch 10.00: 1.4000" in said and "1.4500 now" in said
    assert said.endswith("in time: train.epochs=10")


def test_a_run_that_fell_to_its_end_is_told_to_go_on() -> None:
    assert hints.of_run(recipe(1), evaluations(1.5, 1.4, gap=0.1, epochs=1)).endswith("a longer run: train.epochs=2")
    hours = with_vocabulary(llm.load_recipe("quickstart", ["train.hours=2h"]), 16384)
    assert hints.of_run(hours, evaluations(1.5, 1.4, gap=0.1, epochs=1)).endswith("a longer run: train.hours=4")


def test_a_run_for_a_time_keeps_its_time() -> None:
    given = recipe(1, "train.tokens_per_step=32768", "train.hours=2h")
    assert "train.tokens" not in hints.of_run(given, evaluations(1.5, 1.4, gap=0.1, epochs=0.5)).replace(
        "train.tokens_per_step", ""
    )


def test_one_evaluation_shows_no_trend() -> None:
    said = hints.of_run(recipe(1), evaluations(1.5, gap=0.1, epochs=1))
    assert "fell" not in said and "stopped paying" not in said and "evaluate.every=122" in said
    assert "MORE.txt" in hints.of_run(recipe(1), evaluations(1.5, gap=1.0, epochs=1))  # it knows the text by heart


def test_a_run_that_goes_on_from_weights_keeps_its_sizes_and_rates() -> None:
    given = recipe(
        1, "train.optimizer=adamw", "train.learning_rate=1e-5", "model.context=32", "tokenizer.vocabulary=1024"
    )
    given = replace(given, model=replace(given.model, from_="runs/other/best"))
    assert "train.epochs=2" in hints.of_run(given, evaluations(1.5, 1.4, gap=0.1, epochs=1))


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
    assert "unique tokens" in prepared.out.splitlines()[-2] and "most helpful: " in prepared.out.splitlines()[-1]
    trained = run(train(path), tmp_path)
    assert trained.status == 0, trained.err
    assert "Next: " in trained.out and "epochs seen" in trained.out and "(training " in trained.out
    assert load(tmp_path / "runs/tiny/recipe.yaml").train.steps == 12


def test_more_text_of_a_mixture_goes_to_its_heaviest_source_in_words_that_a_shell_takes() -> None:
    given = recipe(1)
    sources = tuple(
        TextSource(name=name, text=replace(given.text, files=(file,)), weight=weight)
        for name, file, weight in (("b", "b.txt", 1.0), ("a", "my notes.txt", 3.0))
    )
    given = replace(given, text=replace(given.text, files=(), sources=sources))
    hint = hints.more_text(hints.Facts(given, given.tokenizer.vocabulary, TOKENS, given.train.steps))
    assert str(hint).endswith("'text.sources.a.files=[my notes.txt,MORE.txt]'")
    recipe_file = llm.recipes("quickstart")
    for name in (
        "a,b",
        "notes(1).txt",
        "cost$5",
        "it's",
        "hub:a: b",
        "!x",
        'a"b',
        "[a]",
        "wiki-leads",
        "null",
        "ä&b.txt",
    ):
        odd = replace(recipe(1), text=replace(recipe(1).text, files=(name,)))
        said = str(hints.more_text(hints.Facts(odd, odd.tokenizer.vocabulary, TOKENS, odd.train.steps)))
        words = shlex.split(said.partition(": ")[2])
        assert load(recipe_file, words).text.files == (name, "MORE.txt")
