"""A run whose shards are whole needs its text no more: it resumes, is read, and says if the text is another one now."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from llm.base import atomic_io
from llm.config import resolving
from llm.config.reading import load
from llm.data import sources
from llm.interop import pretrained
from llm.training import own_data
from tests.forks import Ended, digest, run, run_group, script, train, write_recipe, write_text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of a run that was never stopped."""
    return digest(finished(project(tmp_path_factory.mktemp("whole"))))


def project(folder: Path, **changes: object) -> Path:
    write_text(folder / "text.txt")
    write_recipe(folder, folder / "text.txt", **{"text.files": "[text.txt]", "text.cache": "data", **changes})
    return folder


def finished(folder: Path) -> Path:
    done = run(train(folder / "recipe.yaml"), folder)
    assert done.status == 0, done.err
    return folder


def stopped(folder: Path, **changes: object) -> Path:
    assert run(train(project(folder, **changes) / "recipe.yaml", stop_after=5), folder).status == 75
    return folder


def resumed(folder: Path, *overrides: object) -> Ended:
    done = run(train(folder / "recipe.yaml", *overrides), folder)
    assert done.status == 0 and "resuming tiny from step 5" in done.out and "training a tokenizer" not in done.out, done
    return done


def moved(text: Path) -> None:
    text.rename(text.with_name("elsewhere.txt"))


def grown(text: Path) -> None:
    write_text(text, documents=70)


def edited(text: Path) -> None:
    """Another text of the same size."""
    text.write_bytes(text.read_bytes().replace(b"1897", b"1898"))


def touched(text: Path) -> None:
    shutil.copy(text, text.with_name("copy.txt"))
    text.with_name("copy.txt").replace(text)


def damaged(text: Path) -> None:
    text.write_bytes(b"caf\xe9" * 99)


FATES: dict[str, tuple[Callable[[Path], None], str]] = {
    "moved": (moved, "text: text.txt is not there"),
    "grown": (grown, "text: changed since then; tiny goes on with what it was trained on"),
    "edited": (edited, "text: changed since then"),
    "damaged": (damaged, "text: text.txt is not UTF-8"),
    "touched": (touched, ""),
}


@pytest.mark.parametrize("fate", FATES)
def test_a_run_resumes_to_the_bit_whatever_became_of_its_text(tmp_path: Path, whole: str, fate: str) -> None:
    act, said = FATES[fate]
    act(stopped(tmp_path) / "text.txt")
    out = resumed(tmp_path).out
    assert digest(tmp_path) == whole
    assert said in out if said else "text:" not in out
    assert "run=NAME from=tiny/step-000005" in out or "changed" not in said


def test_a_group_resumes_without_the_text(tmp_path: Path) -> None:
    ended = run_group(train(project(tmp_path) / "recipe.yaml", stop_after=5), tmp_path, 2)
    assert [each.status for each in ended] == [75, 75]
    moved(tmp_path / "text.txt")
    ended = run_group(train(tmp_path / "recipe.yaml"), tmp_path, 2)
    assert [each.status for each in ended] == [0, 0] and "resuming tiny from step 5" in ended[0].out


def test_a_run_resumes_and_is_read_from_another_working_folder(tmp_path: Path, whole: str) -> None:
    (tmp_path / "a").mkdir()
    home, elsewhere = stopped(tmp_path / "a"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved(home / "text.txt")
    home = home.rename(tmp_path / "b")  # as when a project moves to another disk
    done = run(train(home / "runs/tiny/recipe.yaml"), elsewhere)
    assert done.status == 0 and "resuming tiny from step 5" in done.out, done.err
    assert digest(home) == whole and not list(elsewhere.glob("[!.]*/*"))
    for words in (("evaluate",), ("show", "--step", "1"), ("sample", "--tokens", "3", "--prompt", "The")):
        done = run(script(f"module:llm.{words[0]}", home / "runs/tiny", *words[1:]), elsewhere)
        assert done.status == 0, done.err


def test_a_data_set_of_the_hub_is_not_asked_for_when_a_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": text} for text in write_text(tmp_path / "rows.txt").read_text().split("\n\n = ")]

    def stream(*names: str, **given: object) -> list[dict[str, str]]:
        return rows

    import datasets

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_ask_hub", lambda name, dataset, revision: "c" * 40)
        patch.setattr(datasets, "load_dataset", stream)
        stopped(tmp_path, **{"text.files": "[hub:owner/name]"})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    assert "text: not read; tiny goes on" in resumed(tmp_path).out


def test_the_runs_own_tokenizer_is_taken(tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run of an earlier version, whose vocabulary would be trained to other pieces now."""
    from llm.data import pipeline

    stopped(tmp_path)
    monkeypatch.setattr(pipeline, "SETTINGS", 99)
    resumed(tmp_path)
    assert digest(tmp_path) == whole


def test_shards_that_are_not_whole_are_made_again_from_the_text(tmp_path: Path, whole: str) -> None:
    stopped(tmp_path)
    shutil.rmtree(tmp_path / "data")
    done = run(train(tmp_path / "recipe.yaml"), tmp_path)
    assert done.status == 0 and digest(tmp_path) == whole
    assert "holds no finished shards" in done.err and "the text is read instead" in done.err
    assert "training a tokenizer" not in done.out, "its own is at hand"
    assert load(tmp_path / "runs/tiny/recipe.yaml").tokenizer.path is None, "as the recipe says"


def test_a_text_that_was_restored_is_encoded_by_the_run_s_own_tokenizer(tmp_path: Path, whole: str) -> None:
    text = stopped(tmp_path) / "text.txt"
    shutil.rmtree(tmp_path / "data")
    as_it_was = text.read_bytes()
    grown(text)
    ended = run(train(tmp_path / "recipe.yaml"), tmp_path)
    assert ended.status == 4 and "run tiny was trained with another text" in ended.err, ended.err
    text.write_bytes(as_it_was)
    resumed(tmp_path)
    assert digest(tmp_path) == whole


@pytest.mark.parametrize("shards", ["kept", "removed"])
def test_a_vocabulary_of_the_text_s_size_is_recorded_and_stays(tmp_path: Path, shards: str) -> None:
    """Under tokenizer.vocabulary = auto, also where the text has grown, by then, to more."""
    text = stopped(tmp_path, **{"tokenizer.vocabulary": "auto"}) / "text.txt"
    recorded = load(tmp_path / "runs/tiny/recipe.yaml").tokenizer.vocab_size
    assert 300 < recorded < 1024, "as many as so little text allows"
    if shards == "removed":
        shutil.rmtree(tmp_path / "data")
    else:
        text.write_bytes(text.read_bytes() * 400)
    resumed(tmp_path)
    assert load(tmp_path / "runs/tiny/recipe.yaml").tokenizer.vocab_size == recorded
    ended = run(train(tmp_path / "recipe.yaml", f"tokenizer.vocabulary={recorded + 1}"), tmp_path)
    assert ended.status == 4 and f"tokenizer.vocabulary = {recorded}, this" in ended.err, ended.err


@pytest.mark.parametrize(
    "brought", ["tokenizer.path=runs/tiny/tokenizer/tokenizer.model", "model.from=runs/tiny/checkpoints/step-000012"]
)
def test_a_run_of_an_earlier_version_whose_pieces_were_brought_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brought: str
) -> None:
    """It recorded the key's default of then, 4,096, which had no effect."""
    project(tmp_path)
    finished(tmp_path)
    act = partial(train, tmp_path / "recipe.yaml", "run=old", brought, "tokenizer.vocabulary=auto")
    for module in (pretrained, own_data):
        monkeypatch.setattr(module, "with_vocabulary", lambda recipe, pieces: resolving.with_vocabulary(recipe, 4096))
    assert run(act(stop_after=3), tmp_path).status == 75
    monkeypatch.undo()
    done = run(act(), tmp_path)
    assert done.status == 0 and "resuming old from step 3" in done.out, done.err


def test_the_recipe_that_a_run_recorded_finds_its_text_and_tokenizer(tmp_path: Path) -> None:
    finished(project(tmp_path, **{"tokenizer.vocabulary": "auto"}))
    recorded = tmp_path / "runs/tiny/recipe.yaml"
    planned = [run(script("module:llm.plan", recipe), tmp_path).out for recipe in (recorded, tmp_path / "recipe.yaml")]
    assert planned[0].splitlines()[:5] == planned[1].splitlines()[:5] and "an estimate" not in planned[0]
    with (tmp_path / "text.txt").open("a") as file:
        file.write("\n\n = Another article = \n\nIt came later, and is read with the same pieces.\n")
    done = run(train(recorded, "run=onward", "from=tiny/step-12", "train.steps=14"), tmp_path)
    assert done.status == 0 and "training a tokenizer" not in done.out, done.err


def test_a_dropout_that_was_auto_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "MANY_EPOCHS", 0)  # as in an earlier version
    stopped(tmp_path, **{"model.dropout": "auto"})
    monkeypatch.undo()
    resumed(tmp_path)
    assert load(tmp_path / "runs/tiny/recipe.yaml").model.dropout == 0.1


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_anew(tmp_path: Path, whole: str) -> None:
    stopped(tmp_path)
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints")
    done = run(train(tmp_path / "recipe.yaml"), tmp_path)
    assert done.status == 0 and digest(tmp_path) == whole
    assert "run tiny has no checkpoint left of the 5 steps on record: it begins anew" in done.err


def test_only_a_text_that_must_be_encoded_is_read(tmp_path: Path) -> None:
    write_text(tmp_path / "also.txt", documents=50)
    stopped(tmp_path)
    moved(tmp_path / "text.txt")
    resumed(tmp_path, "evaluate.also=[also.txt]")
    place = atomic_io.read_checksummed(tmp_path / "runs/tiny/shards.json")
    assert place["also"]["fingerprint"] != place["fingerprint"]
    (tmp_path / "also.txt").unlink()
    again = run(train(tmp_path / "recipe.yaml", "evaluate.also=[also.txt]"), tmp_path)
    assert again.status == 0, again.err


def test_a_run_that_began_from_another_s_best_resumes_when_that_has_trained_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    student = ("run=student", "model.from=runs/tiny/best", "train.steps=8")
    assert run(train(recipe, stop_after=5), tmp_path).status == 75
    assert run(train(recipe, *student, stop_after=3), tmp_path).status == 75
    assert run(train(recipe, "run=whole", *student[1:]), tmp_path).status == 0
    assert run(train(recipe), tmp_path).status == 0
    done = run(train(recipe, *student), tmp_path)
    assert done.status == 0 and digest(tmp_path, "student") == digest(tmp_path, "whole"), done.err


@pytest.mark.parametrize("name", ["best", "step-000005", "checkpoints/step-000005"])
def test_a_run_resumes_though_what_it_began_from_is_gone(tmp_path: Path, name: str) -> None:
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    assert run(train(recipe, stop_after=5), tmp_path).status == 75
    student = ("run=student", f"model.from=runs/tiny/{name}", "train.steps=8")
    assert run(train(recipe, "run=whole", *student[1:]), tmp_path).status == 0
    assert run(train(recipe, *student, stop_after=3), tmp_path).status == 75
    (tmp_path / "runs/tiny").rename(tmp_path / "runs/elsewhere")
    done = run(train(recipe, *student, stop_after=6), tmp_path)
    assert done.status == 75, done.err
    done = run(train(Path("runs/student/recipe.yaml")), tmp_path)
    assert done.status == 0 and digest(tmp_path, "student") == digest(tmp_path, "whole"), done.err
    refused = run(train(recipe, *student, "run=new"), tmp_path)
    assert refused.status == 2 and refused.err.startswith("error: model.from: "), refused.err
