"""A run on several texts: the same bits after a stop and on any world, each source's figures in the record."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm.config.schema import Text
from llm.data.documents import Corpus, fraction
from llm.run_folder import checkpoint
from llm.run_folder.loaded_run import open_run
from tests.data.test_conversations import said
from tests.forks import digest, run, run_group, script, train, write_recipe, write_text
from tests.test_worlds import go, losses


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and conversations."""
    here = tmp_path_factory.mktemp("mixture")
    said(here)
    write_text(here / "text.txt")
    return here


def mixed_recipe(here: Path, folder: Path, **changes: object) -> Path:
    """Base text and conversations; a step has one micro-batch of each number of windows of a kind."""
    sources = (
        f"{{base: {{files: {here / 'text.txt'}, weight: 0.6}}, talk: {{files: {here / 'chat.jsonl'}, weight: 0.4}}}}"
    )
    keys: dict[str, object] = {
        "text.files": None, "text.sources": sources, "text.cache": here / "cache", "model.context": 64, "train.tokens_per_step": 512,
        "evaluate.prompts": "[The]", "train.steps": 10, "train.warmup": 0}  # fmt: skip
    return write_recipe(folder, here / "text.txt", **{**keys, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]


def trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/tiny/fingerprints.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("world", "shard"), [(1, "none"), *(pytest.param(2, each, marks=pytest.mark.slow) for each in ("none", "full"))]
)
@pytest.mark.parametrize("exact", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_stopped_in_the_middle_it_ends_in_the_same_bits(
    here: Path, tmp_path: Path, world: int, shard: str, exact: str
) -> None:
    recipe = mixed_recipe(here, tmp_path, **{"machine.exact": exact, "machine.micro_batch": 2})
    go(tmp_path / "whole", recipe, world, shard)
    for stop in (3, 7):
        go(tmp_path / "parts", recipe, world, shard, status=75, stop_after=stop)
    go(tmp_path / "parts", recipe, world, shard)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    measured = [[line for line in lines(tmp_path / name) if "sources" in line] for name in ("whole", "parts")]
    assert measured[0] == measured[1] and [line["step"] for line in measured[0]] == [5, 10]


def test_stopped_after_any_step_it_ends_in_the_same_bits(here: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(here, tmp_path)
    go(tmp_path / "whole", recipe, 1, "none")
    for stop in range(1, 10):
        go(tmp_path / "parts", recipe, 1, "none", status=75, stop_after=stop)
    go(tmp_path / "parts", recipe, 1, "none")
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@pytest.mark.parametrize(("world", "shard"), [(2, "full"), pytest.param(4, "none", marks=pytest.mark.slow)])
def test_on_any_number_of_processes_the_data_and_with_exact_the_bits_are_the_same(
    here: Path, tmp_path: Path, world: int, shard: str
) -> None:
    recipe = mixed_recipe(here, tmp_path, **{"machine.exact": "true"})
    go(tmp_path / "1", recipe, 1, "none")
    go(tmp_path / "group", recipe, world, shard)
    assert digest(tmp_path / "group") == digest(tmp_path / "1")
    assert trace(tmp_path / "group") == trace(tmp_path / "1")
    go(tmp_path / "moved", recipe, 2, "none", status=75, stop_after=4)
    go(tmp_path / "moved", recipe, 1, "none")
    assert digest(tmp_path / "moved") == digest(tmp_path / "1")


@pytest.mark.slow
def test_one_curve_on_1_2_and_4_processes_without_exact(here: Path, tmp_path: Path) -> None:
    """The loss of a step is that of its targets, of which the processes have different numbers."""
    changes = {"train.optimizer": "adamw", "train.learning_rate": 0.003, "train.tokens_per_step": 512}
    recipe = mixed_recipe(here, tmp_path, **changes)
    for world in (1, 2, 4):
        go(tmp_path / f"{world}", recipe, world, "none")
        assert losses(tmp_path / f"{world}") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        windows = [[line["windows"] for line in trace(tmp_path / name)] for name in (f"{world}", "1")]
        assert windows[0] == windows[1]


def test_steps_that_are_skipped_shift_all_that_follows(here: Path, tmp_path: Path) -> None:
    plain, skipping = tmp_path / "plain", tmp_path / "skipping"
    for folder, changes in ((plain, {}), (skipping, {"train.skip": "[3-4]"})):
        folder.mkdir()
        go(folder, mixed_recipe(here, folder, **changes), 1, "none")
    windows = [[line["windows"] for line in trace(folder)] for folder in (plain, skipping)]
    assert windows[1][:8] == windows[0][:2] + windows[0][4:]
    for step in (2, 3, 8):
        shown = [
            run(script("module:llm.show", "tiny", "--step", at), folder).out.partition("\n")[2]
            for at, folder in ((step if step < 3 else step + 2, plain), (step, skipping))
        ]
        assert shown[0] == shown[1] and ", base, epoch" in shown[0] and ", talk, epoch" in shown[0]


def test_the_record_has_each_source_and_what_was_read_of_it(here: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", mixed_recipe(here, tmp_path), 1, "none")
    (last,) = [line for line in lines(tmp_path / "run") if line.get("step") == 10 and "sources" in line]
    each = last["sources"]
    assert sum(its["windows"] for its in each.values()) == 10 * 8
    assert abs(each["base"]["windows"] - 48) <= 2
    assert (
        min(its["val_loss"] for its in each.values()) < last["val_loss"] < max(its["val_loss"] for its in each.values())
    )
    said = (tmp_path / "run/out.txt").read_text()
    assert "mixture: base 60.0% of the windows, " in said and "  talk: " in said and "base: text: " in said
    ended = run(script("module:llm.evaluate", "tiny/newest"), tmp_path / "run")
    assert ended.status == 0, ended.err
    for its in each.values():
        assert (
            f"loss                  {its['val_loss']:.4f} nats a token\nbits per byte         {its['bits_per_byte']:.4f}"
            in ended.out
        )
    card = (checkpoint.folder_of(tmp_path / "run/runs/tiny", 10) / "README.md").read_text()
    assert "| text | text.txt: " in card and "| text | chat.jsonl: " in card
    verified = run(script("module:llm.verify", "tiny"), tmp_path / "run")
    assert verified.status == 0, verified.out + verified.err


def test_it_goes_on_from_a_base_run_and_measures_what_was_known(here: Path, tmp_path: Path) -> None:
    base = write_recipe(
        tmp_path,
        here / "text.txt",
        **{"run": "base", "train.steps": 3, "train.warmup": 0, "text.cache": here / "cache"},
    )
    assert run(train(base), tmp_path).status == 0
    changes = {
        "model.from": "runs/base/best",
        "tokenizer.vocabulary": None,
        "model.dim": None,
        "model.layers": None,
        "model.heads": None,
    }
    go(tmp_path, mixed_recipe(here, tmp_path, **changes), 1, "none")
    assert [line["step"] for line in lines(tmp_path) if "sources" in line] == [0, 5, 10]
    opened = open_run("tiny", runs=tmp_path / "runs")
    assert opened.is_chat and opened.recipe.text.names == (str(here / "text.txt"), str(here / "chat.jsonl"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("text.sources.base.weight=0.5", "text.sources.base.weight = 0.6, this recipe says 0.5"),
        ("text.sources.talk.epochs=3", "text.sources.talk.epochs = nothing, this recipe says 3.0"),
    ],
)
def test_a_run_is_not_resumed_with_another_mixture(here: Path, tmp_path: Path, change: str, words: str) -> None:
    recipe = mixed_recipe(here, tmp_path)
    assert run(train(recipe, stop_after=4), tmp_path).status == 75
    (ended,) = run_group(train(recipe, change), tmp_path, 1)
    assert ended.status == 4 and words in ended.err and len(ended.err.splitlines()) == 1, ended.err
    moved = here / "moved.txt"
    moved.write_bytes((here / "text.txt").read_bytes())  # where a text lies is no science
    assert run(train(recipe, f"text.sources.base.files={moved}"), tmp_path).status == 0


def test_a_source_that_is_wrong_is_named_in_one_line(here: Path, tmp_path: Path) -> None:
    ended = run(train(mixed_recipe(here, tmp_path), "text.sources.base.files=nowhere.txt"), tmp_path)
    assert ended.status == 2 and "nowhere.txt" in ended.err and len(ended.err.splitlines()) == 1
    ended = run(
        train(mixed_recipe(here, tmp_path), "text.sources.base.epochs=0.1", "text.sources.talk.epochs=1e-3"), tmp_path
    )
    assert ended.status == 2 and "all text.sources are at their epochs after" in ended.err
    ended = run(train(mixed_recipe(here, tmp_path), "text.sources.talk.epochs=1", "train.hours=1"), tmp_path)
    assert ended.status == 2 and "needs a length in steps, tokens or epochs" in ended.err


def test_a_source_that_is_missing_is_told_before_any_is_read(here: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(here, tmp_path, **{"text.cache": tmp_path / "cache"})
    ended = run(train(recipe, "text.sources.talk.files=nowhere.jsonl"), tmp_path)
    assert ended.status == 2 and "nowhere.jsonl is not there" in ended.err
    assert not list(tmp_path.glob("cache/s*/*")), "surveys and shards"


def test_a_source_over_its_cap_says_so_before_the_run(here: Path, tmp_path: Path) -> None:
    ended = run(train(mixed_recipe(here, tmp_path), "text.sources.talk.epochs=5%"), tmp_path)
    assert ended.status == 0, ended.err
    before = ended.out.partition("step  1/10")[0]
    assert "talk would be read more than text.sources.talk.epochs = 0.05 times" in before
    last = [line for line in lines(tmp_path) if "sources" in line][-1]
    assert last["sources"]["talk"]["epochs"] <= 0.05 + 0.01


def test_a_source_that_holds_out_no_answer_leaves_the_others_measured(here: Path, tmp_path: Path) -> None:
    """In training, in llm.evaluate, and in llm.runs once it is finished; so too where a source holds nothing out."""
    rows = [json.loads(line) for line in (here / "chat.jsonl").read_text().splitlines()]
    asked = [{"messages": [{"role": "user", "content": f"And number {number}? " * 40}]} for number in range(100)]
    kept = []
    for row in [*rows, *asked]:
        (tmp_path / "one.jsonl").write_text(json.dumps(row))
        (document,) = Corpus(Text(files=(str(tmp_path / "one.jsonl"),))).documents()
        if (fraction(document) < 0.2) == (row in asked):  # a tenth of the bytes is held out
            kept.append(json.dumps(row))
    (tmp_path / "chat.jsonl").write_text("\n".join(kept))
    shutil.copy(here / "text.txt", tmp_path)
    recipe = mixed_recipe(tmp_path, tmp_path)
    assert run(train(recipe), tmp_path).status == 0
    measured = [line for line in lines(tmp_path) if "val_loss" in line]
    assert [list(line["sources"]) for line in measured] == [["base"]] * 2
    again = run(train(recipe), tmp_path)
    assert again.status == 0 and "is finished" in again.out, again.err
    scored = run(script("module:llm.evaluate", "tiny"), tmp_path)
    assert scored.status == 0 and "base: " in scored.out and "talk" not in scored.out, scored.err
    assert f"loss                  {measured[-1]['sources']['base']['val_loss']:.4f}" in scored.out

    nothing = run(train(recipe, "run=less", "text.sources.base.validation=0"), tmp_path)
    assert nothing.status == 0, nothing.err
    scored = run(script("module:llm.evaluate", "less"), tmp_path)
    assert scored.status == 2 and "holds nothing out to score" in scored.err
