"""Mixtures: every source has its share of any row of windows, its own epochs, and its own shards, whatever the weights."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.errors import RecipeError, TextError
from llm.config.reading import dump, load
from llm.config.schema import Recipe, TextSource, Tokenizer, science
from llm.data.batches import BatchLoader, Tokens
from llm.data.mixed_pipeline import find_shards, prepare, recipe_of_source
from llm.data.mixture import PERIOD, MixedShuffle, lines, order_of, pattern, shares
from llm.data.shards import MixedShards, Split
from llm.data.shuffle import WindowShuffle
from llm.insight import cards, planning
from tests.data.test_conversations import said
from tests.forks import write_recipe, write_text

CONTEXT, WINDOWS = 4, 10_000
WEIGHTS = st.lists(st.floats(0.001, 1), min_size=2, max_size=12)


def mixed(weights: list[float], sizes: list[int], seed: int = 1) -> MixedShuffle:
    """Sources of so many windows an epoch; each token says where it stands in all of them."""
    names = [f"s{number}" for number in range(len(weights))]
    ends = np.cumsum([0] + [(size + 1) * CONTEXT for size in sizes]).tolist()
    sides: list[Any] = [Tokens(np.arange(*ends)) for ends in pairwise(ends)]
    orders = [WindowShuffle(seed + number, side.tokens, CONTEXT) for number, side in enumerate(sides)]
    given_shares = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    return MixedShuffle(seed, dict(zip(names, zip(orders, sides, strict=True), strict=True)), given_shares)


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, first=st.integers(0, 10**12), seed=st.integers(0, 2**32 - 1))
def test_any_ten_thousand_windows_have_the_shares_of_the_weights(weights: list[float], first: int, seed: int) -> None:
    order, due = mixed(weights, [7] * len(weights), seed), np.array(weights) / sum(weights)
    which, _ = order.places(np.arange(first, first + WINDOWS))
    found = np.bincount(which, minlength=len(weights))
    assert (abs(found / WINDOWS - due) <= 0.005).all()
    assert (abs(found - WINDOWS * due) <= 2 + due * len(weights)).all()  # evenly spaced: it is far closer
    assert (found == order.read_before(first + WINDOWS) - order.read_before(first)).all()


@settings(deadline=None, max_examples=50)
@given(weights=WEIGHTS, row=st.integers(1, 300), first=st.integers(0, 10**9))
def test_windows_of_a_source_are_evenly_spaced(weights: list[float], row: int, first: int) -> None:
    order, due = mixed(weights, [7] * len(weights)), np.array(weights) / sum(weights)
    found = order.read_before(first + row) - order.read_before(first)
    assert (abs(found - row * due) <= 1.5 + due * len(weights)).all()


def test_a_tenth_is_every_tenth_window() -> None:
    which, _ = mixed([0.9, 0.1], [50, 50]).places(np.arange(3 * PERIOD))
    gaps = np.diff(np.flatnonzero(which == 1))
    assert set(gaps.tolist()) <= {9, 10, 11} and abs(gaps.mean() - 10) < 0.01


def test_a_weight_that_is_tiny_still_has_its_windows() -> None:
    assert set(pattern([1.0, 1e-9, 1e-7]).tolist()) == {0, 1, 2}
    assert np.bincount(pattern([0.25, 0.75])).tolist() == [PERIOD // 4, 3 * PERIOD // 4]


@settings(deadline=None, max_examples=25)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 60), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_source_has_each_of_its_windows_once_an_epoch_of_its_own(
    weights: list[float], sizes: list[int], seed: int
) -> None:
    order = mixed(weights, sizes[: len(weights)], seed)
    positions = np.arange(1500)
    which, inner = order.places(positions)
    tokens, targets, segments = order.rows(None, positions)  # type: ignore[arg-type]
    assert segments is None and (targets == tokens + 1).all() and (tokens[:, 0] == order.starts(positions)).all()
    begin = 0
    for number, (own, side) in enumerate(order.sources.values()):
        assert inner[which == number].tolist() == list(
            range((which == number).sum())
        )  # none is left out, none comes twice
        read = tokens[which == number][:, 0] - begin
        for epoch in range(len(read) // own.windows):
            of_epoch = np.sort(read[epoch * own.windows : (epoch + 1) * own.windows])
            assert of_epoch.tolist() == list(
                range(own.offset(epoch), own.offset(epoch) + own.windows * CONTEXT, CONTEXT)
            )
        begin += side.tokens


def test_any_window_is_found_by_its_position_alone() -> None:
    order = mixed([0.5, 0.3, 0.2], [11, 17, 5])
    positions = np.arange(1000)
    whole = order.rows(None, positions)[0]  # type: ignore[arg-type]
    for position in (0, 1, 499, 999):
        assert order.ids(None, position)[:-1].tolist() == whole[position].tolist()  # type: ignore[arg-type]
    shuffled = np.random.default_rng(1).permutation(positions)
    assert (order.rows(None, shuffled)[0] == whole[shuffled]).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_reads_the_same_on_any_world_and_skipping_shifts_all(world: int, micro_batch: int) -> None:
    order: Any = mixed([0.6, 0.3, 0.1], [11, 17, 5])
    none: Any = None

    def read(step: int, skipped: tuple[tuple[int, int], ...], world: int = world) -> list[list[int]]:
        loaders = [BatchLoader(none, order, 16, micro_batch, rank, world, skipped) for rank in range(world)]
        ranks = [[batch.tokens.tolist() for batch in loader.at(step)] for loader in loaders]
        return [row for number in range(len(ranks[0])) for rank in ranks for row in rank[number]]

    plain = [read(step, (), 1) for step in range(12)]
    assert [read(step, ()) for step in range(12)] == plain
    skipping = ((3, 4), (8, 8))  # counted from 1
    left = [rows for number, rows in enumerate(plain, 1) if number not in (3, 4, 8)]
    assert [read(step, skipping) for step in range(9)] == left
    loader = BatchLoader(none, order, 16, micro_batch, 0, world, skipping)
    for steps in range(10):
        there = [position for low, high in loader.read(steps) for position in range(low, high)]
        assert there == [loader.first(step) + n for step in range(steps) for n in range(16)]


# ---------------------------------------------------------------------------------------------- weights and epochs


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    """A run of 100 windows."""
    recipe = write_recipe(folder, folder / "text.txt", **{"train.steps": 25, "train.tokens_per_step": 64})
    return load(recipe, ["text.sources.a.files=a.txt", "text.sources.b.files=b.txt", *overrides])


MIXTURES: list[tuple[list[str], dict[str, float]]] = [
    (["a.weight=3", "b.weight=1"], {"a": 0.75, "b": 0.25}),
    (["a.weight=90%", "b.weight=10%"], {"a": 0.9, "b": 0.1}),
    (["a.weight=1", "b.epochs=2"], {"a": 0.6, "b": 0.4}),  # b has 20 windows
    (["a.weight=1", "b.weight=1", "b.epochs=1"], {"a": 0.8, "b": 0.2}),  # at its cap
    (["a.weight=9", "b.weight=1", "b.epochs=1"], {"a": 0.9, "b": 0.1}),  # below its cap
    (["a.epochs=1", "b.epochs=4"], {"a": 0.5, "b": 0.5}),  # a has 80: the run is shorter than both
    (["a.weight=1", "a.epochs=100", "b.epochs=2"], {"a": 0.6, "b": 0.4}),  # a cap that does not bind
]


@pytest.mark.parametrize(("overrides", "found"), MIXTURES)
def test_a_cap_is_said_where_it_binds(tmp_path: Path, overrides: list[str], found: dict[str, float]) -> None:
    """Not where a source without a weight takes a part of the windows."""
    recipe = recipe_of(tmp_path, *(f"text.sources.{each}" for each in overrides))
    order = mixed([1.0, 1.0], [80, 20])
    assert isinstance(order, MixedShuffle)
    order = replace(order, shares=found, sources=dict(zip(found, order.sources.values(), strict=True)))
    capped = found["b"] == 0.2 and "b.epochs=1" in overrides
    assert any("would be read more" in line for line in lines(recipe, order, 25)) == capped


@pytest.mark.parametrize(("overrides", "found"), MIXTURES)
def test_weights_and_epochs_come_to_shares(tmp_path: Path, overrides: list[str], found: dict[str, float]) -> None:
    recipe = recipe_of(tmp_path, *(f"text.sources.{each}" for each in overrides))
    assert shares(recipe, {"a": 80, "b": 20}) == pytest.approx(found)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["a.weight=1", "b.epochs=5"], "b in text.sources take 100 windows of the run's 100, and leave none"),
        (["a.weight=1", "a.epochs=0.5", "b.weight=1", "b.epochs=1"], "at most train.steps=15"),
        (["a.weight=1", "a.epochs=0.001", "b.weight=1", "b.epochs=0.001"], "of 25 steps: raise one's epochs"),
        (["a.weight=1"], "text.sources.b has no weight"),
        (["a.weight=1", "b.weight=-1"], "text.sources.b.weight = -1: must be at least"),
        (["a.weight=1", "b.weight=1", "b.wieght=1"], "did you mean weight?"),
    ],
)
def test_a_mixture_that_cannot_be_had_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        shares(recipe_of(tmp_path, *(f"text.sources.{each}" for each in overrides)), {"a": 80, "b": 20})
    assert words in str(refused.value)


# ---------------------------------------------------------------------------------------------- prepared


def sources_of(folder: Path, **weights: float) -> Recipe:
    """A text, the same text by lines, and conversations."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text, 150)
        (folder / "other.txt").write_text("".join(f"Other words, number {n}, than those.\n" for n in range(300)))
        said(folder)
    files = {"text": text, "other": folder / "other.txt", "chat": folder / "chat.jsonl"}
    given_weights = {"text": 0.5, "other": 0.2, "chat": 0.3} | weights
    overrides = [f"text.sources.{name}.files={file}" for name, file in files.items()]
    overrides += [f"text.sources.{name}.weight={weight}" for name, weight in given_weights.items()]
    recipe = write_recipe(folder, text, **{"model.context": 32})
    return load(recipe, [*overrides, "text.sources.other.documents=lines"])


def test_other_weights_encode_nothing_anew(tmp_path: Path) -> None:
    first = prepare(sources_of(tmp_path), say=lambda line: None)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    said: list[str] = []
    again = prepare(sources_of(tmp_path, text=0.1, chat=0.8), say=said.append)
    assert again.shards.fingerprint == first.shards.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == there
    assert sum("made before" in line for line in said) == 3 and not any("training a tokenizer" in line for line in said)
    found = find_shards(sources_of(tmp_path))
    assert found is not None and found.fingerprint == first.shards.fingerprint
    own = shutil.copy(next((tmp_path / "cache").rglob("tokenizer.model")), tmp_path / "own.model")
    given = replace(sources_of(tmp_path), tokenizer=Tokenizer(path=str(own)))
    assert find_shards(given) is None
    made = prepare(given, say=lambda line: None).shards
    found = find_shards(given)
    assert found is not None and found.fingerprint == made.fingerprint


def test_each_source_s_shards_are_those_it_has_alone(tmp_path: Path) -> None:
    recipe = sources_of(tmp_path)
    prepared = prepare(recipe, say=lambda line: None)
    for source in recipe.text.sources:
        one = prepare(recipe_of_source(recipe, source), lambda line: None, tokenizer=prepared.tokenizer)
        assert one.shards.fingerprint == prepared.shards.sources[source.name].fingerprint
    assert isinstance(prepared.shards, MixedShards)
    joined = prepared.shards.train
    whole = np.concatenate([each.train.read(0, each.train.tokens) for each in prepared.shards.sources.values()])
    assert (joined.read(0, joined.tokens) == whole).all() and joined.tokens == len(whole)
    assert joined.documents == sum(each.train.documents for each in prepared.shards.sources.values())
    assert len(joined.document_starts()) == joined.documents


@pytest.mark.parametrize("mask", [True, False])
def test_conversations_stay_apart_and_documents_under_the_mask(tmp_path: Path, mask: bool) -> None:
    recipe = sources_of(tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, document_mask=mask))
    shards = prepare(recipe, say=lambda line: None).shards
    order = order_of(recipe, shards)
    assert isinstance(order, MixedShuffle)
    side: Split = shards.train
    for position in range(60):
        name, inner, own = order.place(position)
        tokens, targets, segments = order.rows(side, np.array([position]))
        alone_tokens, alone_targets, alone_segments = own.rows(shards.sources[name].train, np.array([inner]))
        assert (tokens == alone_tokens).all() and (targets == alone_targets).all()
        assert (segments is None) == (name != "chat" and not mask)
        assert segments is None or (segments == alone_segments).all()
    tokens, targets, segments = order.rows(side, np.arange(60))
    assert segments is not None
    for row in range(60):
        of_text = order.place(row)[0] != "chat"
        documents = np.cumsum(tokens[row] == side.read(0, 1)[0]) if mask else np.zeros_like(tokens[row])
        assert (segments[row] == documents).all() or not of_text
        assert (targets[row] >= 0).all() == of_text  # every token of a text is a target


def test_the_mixture_is_said_before_the_run(tmp_path: Path) -> None:
    recipe = sources_of(tmp_path)
    shards = prepare(recipe, say=lambda line: None).shards
    assert lines(recipe, order_of(recipe, shards), 25)[0].startswith("mixture: chat 30.0% of the windows, ")
    capped = load(tmp_path / "recipe.yaml", [
        *(f"text.sources.{each.name}.files={each.text.files[0]}" for each in recipe.text.sources),
        "text.sources.text.weight=1", "text.sources.chat.weight=1", "text.sources.other.weight=2", "text.sources.other.epochs=0.01",
        "text.sources.other.documents=lines"])  # fmt: skip
    said = lines(capped, order_of(capped, shards), 25)
    assert len(said) == 2 and "other would be read more than text.sources.other.epochs = 0.01 times" in said[1]


def test_what_one_source_holds_out_and_another_trains_on_is_said(tmp_path: Path) -> None:
    sources_of(tmp_path)
    shared = ["text.sources.a.files=text.txt", "text.sources.b.files=[other.txt,text.txt]"]
    shared += ["text.sources.a.weight=1", "text.sources.b.weight=1"]
    for share, words in (
        (0.5, "of its held-out documents are trained on as part of b, which holds out less"),
        (0.1, ""),
    ):
        recipe = load(tmp_path / "recipe.yaml", [*shared, f"text.sources.a.validation={share}"])
        recipe = replace(
            recipe, text=replace(recipe.text, sources=tuple(_in(tmp_path, each) for each in recipe.text.sources))
        )
        said: list[str] = []
        prepare(recipe, said.append)
        assert any(words in line for line in said) and (words or not any("held-out" in line for line in said))


def _in(folder: Path, source: TextSource) -> TextSource:
    return replace(source, text=replace(source.text, files=tuple(str(folder / name) for name in source.text.files)))


def test_an_error_names_the_key_of_its_source(tmp_path: Path) -> None:
    sources_of(tmp_path)
    (tmp_path / "small.txt").write_text("A few words.")
    files = {"text": "text.txt", "small": "small.txt"}
    overrides = [f"text.sources.{name}.files={tmp_path / file}" for name, file in files.items()]
    overrides += [f"text.sources.{name}.weight=1" for name in files]
    with pytest.raises(TextError, match=r"use more text, or text\.sources\.small\.validation=0"):
        prepare(load(tmp_path / "recipe.yaml", overrides), lambda line: None)


def test_a_recipe_of_sources_is_written_and_read_again_and_overridden(tmp_path: Path) -> None:
    recipe = sources_of(tmp_path)
    path = tmp_path / "again.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    assert load(path) == recipe and load(path).text.names == tuple(
        n for each in recipe.text.sources for n in each.text.files
    )
    assert load(path, ["text.files=a.txt"]).text.sources == () and load(path, ["text.files=a.txt"]).text.files == (
        "a.txt",
    )
    assert load(path, ["text.sources.chat.weight=90%"]).text.sources[0].weight == 0.9
    differ = (
        science(recipe).items()
        ^ science(load(path, ["text.sources.chat.weight=90%", "text.sources.chat.files=b"])).items()
    )
    assert {name for name, _ in differ} == {"text.sources.chat.weight"}


def test_a_plan_says_the_share_and_the_epochs_of_each_source(tmp_path: Path) -> None:
    recipe = sources_of(tmp_path)
    on = cards.Device("a card", 12 << 30)
    assert any(
        line.startswith("mixture: chat 30.0% of the windows, about ")
        for line in planning.lines(planning.plan(recipe, on))
    )
    shards = prepare(recipe, say=lambda line: None).shards
    made = planning.plan(recipe, on)
    assert (made.text_tokens, made.validation_tokens) == (shards.train.tokens, shards.validation.tokens)
    assert not made.text_is_estimated and made.sources.keys() == {"chat", "other", "text"}
