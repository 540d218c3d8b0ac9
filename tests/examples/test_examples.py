"""The worked examples train, save, resume and sample as our own parts do."""

import json
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import llm
from llm.base.errors import RefusedError, StoppedError, TextError
from llm.run_folder import checkpoint
from llm.training.context import Parts
from llm.training.session import train as train_until
from tests.examples.database import rows
from tests.examples.lion import Lion
from tests.examples.relu_squared import ReluSquared, relu_squared
from tests.examples.stop_early import StopEarly
from tests.forks import digest, ended, run, run_group, start, write_recipe, write_text


def done(act: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    result = run(act, folder)
    assert result.status == 0, result.err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, write_text(folder / "text.txt"), **{"evaluate.prompts": "[My self Har]"})


PARTS = {"model": relu_squared, "optimizer": Lion}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_ones_own_is_recorded_and_resumes_in_the_same_bits(tmp_path: Path, recipe: Path, part: str) -> None:
    own = {part: PARTS[part]}

    def whole() -> None:
        trained = llm.train(llm.load_recipe(recipe), **own)
        name = f"{PARTS[part].__module__}.{PARTS[part].__qualname__}"
        assert trained.loaded.checkpoint.manifest["parts"] == {part: name}
        losses = [line["loss"] for line in trained.metrics if "loss" in line]
        assert losses[-1] < losses[0] and not [line for line in trained.metrics if "event" in line]
        assert trained.generate("My self Har", tokens=4)

    def halves() -> None:
        with pytest.raises(StoppedError):
            train_until(llm.load_recipe(recipe), until=6, parts=Parts(**own))
        with pytest.raises(RefusedError, match=f"{part} = tests.examples.*, this start has our own: pass {part}="):
            llm.train(llm.load_recipe(recipe))
        llm.train(llm.load_recipe(recipe), **own)

    done(whole, tmp_path / "whole")
    done(halves, tmp_path / "halves")
    assert digest(tmp_path / "whole") == digest(tmp_path / "halves")


@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_they_train_on_two_processes(tmp_path: Path, recipe: Path, shard: str) -> None:
    def act() -> None:
        assert torch.distributed.is_available()
        llm.train(llm.load_recipe(recipe, [f"machine.shard={shard}"]), **PARTS)  # type: ignore[arg-type]

    first, second = run_group(act, tmp_path, world=2)
    assert first.status == second.status == 0 and second.out == "", (first.err, second)
    found = checkpoint.newest(tmp_path / "runs" / "tiny", print)
    assert found is not None and found.step == 12 and found.manifest["machine"]["world"] == 2


def test_lion_keeps_every_bit_where_a_gradient_is_not_finite() -> None:
    model, train = torch.nn.Linear(3, 2), llm.load_recipe("quickstart", ["train.weight_decay=0.1"]).train
    optimizer = Lion(model, train, torch.float32, None)  # type: ignore[arg-type]
    for finite in (True, False):
        before = [each.clone() for each in (model.weight, optimizer.moments["weight/momentum"].local)]
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 if finite else torch.nan)
        optimizer.step(0, 1.0, torch.tensor(1.0), torch.tensor(finite))
        after = (model.weight, optimizer.moments["weight/momentum"].local)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [not finite] * 2


def test_a_run_with_a_model_of_its_own_is_opened_with_it_only(tmp_path: Path, recipe: Path) -> None:
    def act() -> None:
        llm.train(llm.load_recipe(recipe), model=relu_squared)
        assert isinstance(llm.open_run("tiny", model=relu_squared).model.model.layers[0].mlp, ReluSquared)
        with pytest.raises(
            RefusedError, match=r"a model of its own, tests\.examples\.relu_squared\.relu_squared: open it"
        ):
            llm.open_run("tiny")
        folder = llm.open_run("tiny", model=relu_squared).loaded.checkpoint.folder
        assert not (folder / "config.json").exists()  # it would say that this is a Qwen3
        assert "relu_squared" in (folder / "README.md").read_text()

    done(act, tmp_path)


def database_of(text: Path, path: Path) -> Path:
    """The documents of a text in a table of its own."""
    documents = [f" = Article{part}" for part in text.read_text().split(" = Article")[1:]]
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO notes (text) VALUES (?)", [(each,) for each in documents])
    connection.close()
    return path


def test_documents_of_a_database_train_as_the_same_documents_of_a_file_do(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    database, recipe = database_of(text, tmp_path / "notes.sqlite"), llm.load_recipe(write_recipe(tmp_path, text))
    (tmp_path / "elsewhere").mkdir()
    bare = llm.load_recipe(write_recipe(tmp_path / "elsewhere", tmp_path / "nowhere.txt"))

    def act() -> None:
        trained = llm.train(bare, documents=partial(rows, database))
        assert trained.loaded.checkpoint.manifest["parts"] == {"documents": "tests.examples.database.rows"}
        assert trained.recipe.text.files == ("tests.examples.database.rows",)
        assert trained.evaluate()["bits_per_byte"] > 0

    done(act, tmp_path / "database")
    done(lambda: llm.train(recipe), tmp_path / "file")
    assert digest(tmp_path / "database") == digest(tmp_path / "file")

    def changed() -> None:
        with pytest.raises(RefusedError, match="another text"):
            llm.train(bare, documents=lambda: ["another text, of which there is enough. " * 200] * 9 + ["more"] * 999)

    done(changed, tmp_path / "database")


@pytest.mark.parametrize("gives, words", [
    (lambda calls: [f"document {calls} of a source that changes. " * 9] * 20, "gave other documents than before"),
    (lambda calls: [b"caf\xe9"], "document 1 of .* is not UTF-8 at byte 3"),
    (lambda calls: ["good", 7], "document 2 of .* is of type int"),
    (lambda calls: [" "], "nothing but whitespace"),
    (lambda calls: "one text", "gave str: give documents"),
    (lambda calls: None, "gave NoneType: give documents"),
    (lambda calls: 7, "gave int: give documents"),
])  # fmt: skip
def test_documents_that_cannot_be_trained_on_are_refused(tmp_path: Path, gives: Any, words: str) -> None:
    recipe, calls = llm.load_recipe(write_recipe(tmp_path, tmp_path / "text.txt")), []

    def documents() -> Any:
        calls.append(1)
        return gives(len(calls))

    def act() -> None:
        with pytest.raises(TextError, match=words):
            llm.train(recipe, documents=documents)

    done(act, tmp_path)


def test_on_log_gets_each_line_and_may_stop_the_run(tmp_path: Path, recipe: Path) -> None:
    def act() -> None:
        lines: list[dict[str, Any]] = []
        trained = llm.train(llm.load_recipe(recipe, ["run=watched"]), on_log=lines.append)
        assert json.loads(json.dumps(lines)) == trained.metrics and len(lines) >= 12
        stop = StopEarly(patience=0)  # at the first evaluation
        with pytest.raises(StoppedError):
            llm.train(llm.load_recipe(recipe, ["run=stopped"]), on_log=stop)
        assert llm.open_run("stopped/newest").step < 12

    done(act, tmp_path)


def test_an_on_log_that_raises_is_left_out_and_the_run_goes_on(tmp_path: Path, recipe: Path) -> None:
    def act() -> None:
        def fails(line: dict[str, Any]) -> None:
            raise ValueError("no such dashboard")

        assert llm.train(llm.load_recipe(recipe), on_log=fails).step == 12

    result = ended(start(act, tmp_path), tmp_path)
    assert result.status == 0, result.err
    assert result.out.count("on_log is left out from here on (no such dashboard)") == 1
