"""A text is prepared once, whoever asks and however often it is killed, again when it changes, and never in silence."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from llm.base import atomic_io
from llm.base.errors import DiskError, LLMError, RecipeError, RefusedError, TextError
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.data import pipeline, survey, text_files
from llm.data.documents import Corpus
from llm.data.pipeline import Prepared, prepare_text
from llm.data.progress import Show
from llm.data.survey import MEASURABLE
from llm.data.tokenizer import Tokenizer
from llm.prepare import main
from tests.data.test_documents import needs_wiki
from tests.data.test_tokenizer import DOCUMENTS

MARKER = "<|endoftext|>\n"
TEXT = MARKER.encode().join(DOCUMENTS)


def text_file(folder: Path, documents: int = 200, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(MARKER.encode().join(DOCUMENTS[:documents]))
    return path


def recipe(folder: Path, text: Path | str = "text.txt", **changes: object) -> Recipe:
    return load(recipe_file(folder), settings(folder, text, changes))


def recipe_file(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("text: {files: [text.txt]}\ntrain: {steps: 1}\n", encoding="utf-8")
    return path


def settings(folder: Path, text: Path | str, changes: dict[str, object]) -> list[str]:
    given = {
        "text.files": f"[{folder / text}]", "text.cache": folder / "data", "text.validation": 0.1,
        "tokenizer.vocabulary": 320, "model.context": 64,
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    given["train.tokens_per_step"] = given["model.context"]
    return [f"{name}={value}" for name, value in given.items()]


def command(folder: Path, text: Path, **changes: object) -> list[str]:
    return [sys.executable, "-m", "llm.prepare", str(recipe_file(folder)), *settings(folder, text, changes)]


def told(
    folder: Path, text: Path | str = "text.txt", *, verify: bool = False, **changes: object
) -> tuple[Prepared, str]:
    lines: list[str] = []
    prepared = prepare_text(recipe(folder, text, **changes), lines.append, verify=verify)
    return prepared, "\n".join(lines)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: atomic_io.sha256(path) for path in folder.iterdir()}


def test_the_first_start_prepares_and_says_what_it_did(tmp_path: Path) -> None:
    text_file(tmp_path)
    prepared, said = told(tmp_path)
    train, validation = prepared.shards.train, prepared.shards.validation
    assert f"text: {train.documents} train + {validation.documents} validation documents" in said
    assert "rule: marker <|endoftext|>" in said and f"bytes: {train.text_bytes:,} train" in said
    assert "training a tokenizer of 320 pieces on 0.1 MB of text" in said and "tokenizer: 320 pieces" in said
    assert f"tokens: {train.tokens:,} train + {validation.tokens:,} validation" in said and "bytes a token" in said
    folder = prepared.shards.folder
    assert f"shards: {folder.parent}/{folder.name[:12]}..." in said.splitlines() and "made before" not in said
    assert {path.name for path in (tmp_path / "data" / "tokenizers").glob("*/*")} == {
        "tokenizer.model", "tokenizer.vocab", "manifest.json"}  # fmt: skip
    assert prepared.shards.manifest["tokenizer"] == prepared.tokenizer.fingerprint


def test_the_tokenizer_sees_nothing_of_the_validation_side(tmp_path: Path) -> None:
    text_file(tmp_path)
    one = prepare_text(recipe(tmp_path))
    sides = one.shards.train, one.shards.validation
    text = one.tokenizer.decode(sides[0].read(0, sides[0].tokens).tolist()).encode()
    assert Tokenizer.train([text], vocab_size=320).fingerprint == one.tokenizer.fingerprint


def test_a_second_start_does_not_read_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path)
    first, _ = told(tmp_path)

    def unreadable(path: Path, identity: object, notes: object) -> Iterator[bytes]:
        raise TextError("it is read")

    monkeypatch.setattr(text_files, "read_chunks", unreadable)
    second, said = told(tmp_path)
    assert "made before" in said and "training" not in said
    assert second.shards.fingerprint == first.shards.fingerprint
    with pytest.raises(TextError, match="it is read"):
        told(tmp_path, verify=True)


def edited(path: Path) -> None:
    """Another text of the same size in the same file, its time of modification put back."""
    stat = path.stat()
    with path.open("r+b") as file:
        data = file.read().replace(b"1897", b"1898", 1)
        file.seek(0)
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_an_edit_whose_time_is_put_back_is_seen_at_the_next_start(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    first, _ = told(tmp_path)
    edited(path)
    assert told(tmp_path)[0].shards.fingerprint != first.shards.fingerprint


def test_an_edit_that_looks_like_none_is_seen_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that keeps no time of change."""
    monkeypatch.setattr(text_files, "identity", lambda path, stat: [str(path), stat.st_size, stat.st_mtime_ns])
    path = text_file(tmp_path)
    first, _ = told(tmp_path)
    edited(path)
    assert told(tmp_path)[0].shards.fingerprint == first.shards.fingerprint
    assert told(tmp_path, verify=True)[0].shards.fingerprint != first.shards.fingerprint


def test_a_text_that_is_named_twice_is_said_to_be_read_once(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    once, _ = told(tmp_path)
    for _ in range(2):  # also where the survey is in the cache
        twice, said = told(tmp_path, text__files=f"[{path}, {path.parent}/./{path.name}, {path.parent}/*.txt]")
        assert "is named twice: it is read once (and 1 more)" in said
        assert twice.shards.fingerprint == once.shards.fingerprint


def test_whatever_changes_the_tokens_makes_other_shards_and_the_rest_does_not(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    first, _ = told(tmp_path)
    same = [
        told(tmp_path, model__context=32, seed=5),
        told(tmp_path, text__documents="marker <|endoftext|>"),  # what auto had found
    ]
    shutil.copy(path, tmp_path / "copy.txt")
    same.append(told(tmp_path, text="copy.txt"))
    assert all(other.shards.folder == first.shards.folder and "made before" in said for other, said in same)
    others = [
        told(tmp_path, text__documents="lines"),
        told(tmp_path, text__validation=0.2),
        told(tmp_path, tokenizer__vocabulary=321),
        told(tmp_path, tokenizer__terms="[qrs]"),
    ]
    path.write_bytes(path.read_bytes() + b"more\n")
    others.append(told(tmp_path))
    fingerprints = {first.shards.fingerprint, *(other.shards.fingerprint for other, _ in others)}
    assert len(fingerprints) == 1 + len(others) and not any("made before" in said for _, said in others)


def test_a_term_that_the_given_tokenizer_splits_is_refused(tmp_path: Path) -> None:
    text_file(tmp_path)
    first, _ = told(tmp_path, tokenizer__terms="[qrs]")
    path = next(tmp_path.rglob("tokenizer.model"))
    again, _ = told(tmp_path, tokenizer__path=path, tokenizer__terms="[qrs]")
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(RecipeError, match="has no piece 'zzz'"):
        told(tmp_path, tokenizer__path=path, tokenizer__terms="[qrs,zzz]")


def test_a_tokenizer_of_others_is_used_and_told_to_lose_text(tmp_path: Path) -> None:
    from tests.data.test_tokenizer import trained

    text_file(tmp_path)
    (tmp_path / "other.model").write_bytes(trained())
    prepared, said = told(tmp_path, tokenizer__path=tmp_path / "other.model")
    assert prepared.tokenizer.vocab_size == 100
    assert "does not give every text back" in said and "training" not in said
    path = next(tmp_path.rglob("surveys"))
    shutil.rmtree(path)
    with pytest.raises(RecipeError, match=r"none\.model is not there"):
        told(tmp_path, tokenizer__path=tmp_path / "none.model")
    assert not path.exists(), "the text was read before the tokenizer was looked for"


def test_the_sample_of_a_large_text_is_drawn_over_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenth of the text has its part in it, and the order of the documents has none."""
    monkeypatch.setattr(survey, "SAMPLE", 200_000)
    texts = [f"{number:05} ".encode() + b"some words " * 9 + b"\n" for number in range(20_000)]
    found = []
    for order in (texts, texts[::-1]):
        (tmp_path / "text.txt").write_bytes(MARKER.encode().join(order))
        about, sample = survey.survey_of(Corpus(recipe(tmp_path).text), 0.1, Show(print, False))
        assert about.documents[0] > 17_000 and 199_000 < sum(map(len, sample)) <= 200_000
        found.append(sample)
    assert sorted(found[0]) == sorted(found[1])
    tenths = Counter(int(document[:5]) // 2000 for document in found[0])
    assert all(0.07 < tenths[tenth] / len(found[0]) < 0.13 for tenth in range(10))  # 3.3 standard deviations


def test_a_large_text_is_sampled_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path)
    for module in (survey, pipeline):
        monkeypatch.setattr(module, "SAMPLE", 30_000)
    prepared, said = told(tmp_path)
    assert "on a sample of 0.0 MB of 0.1 MB of text" in said and prepared.tokenizer.vocab_size == 320
    shutil.rmtree(tmp_path / "data" / "tokenizers")
    again, _ = told(tmp_path)  # the survey is kept, so that the sample is read on its own
    assert again.tokenizer.fingerprint == prepared.tokenizer.fingerprint


BAD: dict[str, tuple[bytes, dict[str, object], type[LLMError], str]] = {
    "only whitespace": (b" \n\n\t\xe3\x80\x80\n", {}, TextError, "nothing but whitespace"),
    "fewer tokens than a window": (TEXT, {"model.context": 1 << 17}, TextError, "fewer than one window"),
    "one document": (DOCUMENTS[0], {"tokenizer.vocabulary": 280}, TextError, "cannot be on both sides"),
    "all held out": (MARKER.encode().join(DOCUMENTS[:2]), {"text.validation": 0.999}, TextError, "all 2 documents"),
    "too little text": (TEXT, {"tokenizer.vocabulary": 9000}, TextError, "at most tokenizer.vocabulary="),
    "unknown rule": (DOCUMENTS[0], {"text.documents": "pages"}, RecipeError, "blank-lines"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_prepared_is_one_clear_line(tmp_path: Path, case: str) -> None:
    data, changes, kind, words = BAD[case]
    (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(kind, match=re.escape(words)) as raised:
        told(tmp_path, **{name.replace(".", "__"): value for name, value in changes.items()})
    assert raised.value.status == 2 and "\n" not in str(raised.value)


def test_the_context_that_an_error_names_works(tmp_path: Path) -> None:
    text_file(tmp_path, documents=40)
    with pytest.raises(TextError, match="one window") as raised:
        told(tmp_path, model__context=30_000)
    fits = re.findall(r"model.context=(\d+)", str(raised.value))[0]
    assert told(tmp_path, model__context=fits)[0].shards.train.tokens == int(fits) + 1


@pytest.mark.parametrize("asked", [1e-6, 0.05])
def test_a_share_that_leaves_too_little_to_measure_by_is_raised_and_it_is_said(tmp_path: Path, asked: float) -> None:
    text_file(tmp_path, documents=100)
    prepared, said = told(tmp_path, text__validation=asked)
    train, validation = prepared.shards.train, prepared.shards.validation
    assert MEASURABLE <= validation.text_bytes < MEASURABLE + max(map(len, DOCUMENTS))  # and no document more
    part = validation.text_bytes / (train.text_bytes + validation.text_bytes)
    assert f"validation: {part:.1%} of the bytes, as text.validation = {asked:g} would leave too little" in said
    text = prepared.tokenizer.decode(train.read(0, train.tokens).tolist()).encode()
    assert Tokenizer.train([text], vocab_size=320).fingerprint == prepared.tokenizer.fingerprint  # saw nothing held out
    assert "made before" in told(tmp_path, text__validation=asked)[1]


UNSPLIT: dict[str, tuple[bytes, dict[str, object]]] = {
    "one document": (DOCUMENTS[0], {}),
    "lines too small": (b"".join(b"line %d of words\n" % n for n in range(30)), {"text__documents": "lines"}),
    "equal documents": ((b"a line of some words and no more\n" + MARKER.encode()) * 99, {}),
    "all held out": (MARKER.encode().join(DOCUMENTS[:20]), {"text__validation": 0.99999}),
}


@pytest.mark.parametrize("case", UNSPLIT)
def test_the_share_that_an_error_on_the_sides_names_works(tmp_path: Path, case: str) -> None:
    data, changes = UNSPLIT[case]
    (tmp_path / "text.txt").write_bytes(data)
    changes = {"text__validation": 0.05, "tokenizer__vocabulary": 288, "model__context": 8, **changes}
    with pytest.raises(TextError) as raised:
        told(tmp_path, **changes)
    assert raised.value.status == 2
    share = re.findall(r"use more text, or text\.validation=([\d.]+)$", str(raised.value))[0]
    shards = told(tmp_path, **changes | {"text__validation": share})[0].shards
    assert shards.train.text_bytes and (shards.validation.text_bytes > 256 if float(share) else share == "0")


@pytest.mark.parametrize("name", ["files.txt", "rows.jsonl"])
def test_a_document_too_large_to_be_held_out_is_cut(tmp_path: Path, name: str) -> None:
    text = b"".join(DOCUMENTS)
    (tmp_path / name).write_bytes(text if name == "files.txt" else json.dumps({"text": text.decode()}).encode())
    prepared, said = told(tmp_path, name, text__documents="files")
    train, validation = prepared.shards.train, prepared.shards.validation
    assert "validation: documents (1 by the rule " in said and "cut at 4,096 bytes" in said
    assert train.text_bytes + validation.text_bytes == len(text) and validation.text_bytes >= MEASURABLE


def small_text(random: Random) -> str:
    """30 kB in one of the forms in which people keep texts."""
    words = "".join(map(bytes.decode, DOCUMENTS)).split()
    separator = random.choice(["\n", "\n\n", "\n\n\n", "\n = Title = \n", "\n<|endoftext|>\n", "\n</s>\n", " "])
    longest, text = random.choice([30, 300, 3000, 9000]), ""
    while len(text.encode()) < 30_000:
        text += " ".join(random.choices(words, k=random.randint(1, longest))) + separator
    return text.encode()[:30_000].decode(errors="ignore")


def test_60_small_texts_are_split_so_that_both_sides_are_of_use(tmp_path: Path) -> None:
    """Validation sides from MEASURABLE to a third of the text; or one line whose first mend works."""
    raised = 0
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "text.txt").write_text(small_text(Random(number)), encoding="utf-8")
        changes: dict[str, object] = {"text__validation": 0.05, "tokenizer__path": tmp_path / "0.model"}
        if number == 0:
            changes = {"text__validation": 0.05, "tokenizer__vocabulary": 4096}
            with pytest.raises(TextError, match=r"at most tokenizer\.vocabulary=") as error:
                told(folder, **changes)
            changes["tokenizer__vocabulary"] = re.findall(r"vocabulary=(\d+)", str(error.value))[0]
        prepared, said = told(folder, **changes)
        if number == 0:
            shutil.copy(next((folder / "data/tokenizers").glob("*/*.model")), tmp_path / "0.model")
        sides = prepared.shards.train.text_bytes, prepared.shards.validation.text_bytes
        assert MEASURABLE <= sides[1] <= sum(sides) / 3, said
        raised += "validation: " in said
    assert 10 < raised < 50


def test_no_validation_side_where_none_is_asked_for(tmp_path: Path) -> None:
    text_file(tmp_path)
    shards = told(tmp_path, text__validation=0)[0].shards
    assert shards.validation.documents == 0 and shards.train.documents == 200


def test_damage_in_the_cache_is_named(tmp_path: Path) -> None:
    text_file(tmp_path)
    shards = told(tmp_path)[0].shards
    model = next((tmp_path / "data" / "tokenizers").glob("*/tokenizer.model"))
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + b"x")
    with pytest.raises(RefusedError, match=r"tokenizer\.model is damaged.*: remove"):
        told(tmp_path)
    model.write_bytes(whole)
    data = bytearray((shards.folder / "train-00000.arrow").read_bytes())
    data[-100] ^= 1
    (shards.folder / "train-00000.arrow").write_bytes(data)
    with pytest.raises(RefusedError, match=r"train-00000\.arrow is missing or damaged"):
        told(tmp_path, verify=True)


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
        with pytest.raises(DiskError, match=r"need about .* are free: make room, or name another place"):
            told(tmp_path)
    assert not list((tmp_path / "data" / "shards").glob("*/*.arrow"))
    assert told(tmp_path)[0].shards.train.documents


def test_a_cache_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    text_file(tmp_path)
    for name in ("text.txt", "text.txt/data"):
        with pytest.raises(RecipeError, match=r"text\.cache = .* cannot be a folder"):
            told(tmp_path, text__cache=tmp_path / name)


def test_two_preparations_at_once_do_the_work_once(tmp_path: Path) -> None:
    text = text_file(tmp_path, name="tëxt.txt")
    both = [
        subprocess.Popen(command(tmp_path, text), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        for _ in range(2)
    ]
    said = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0] and [err for _, err in said] == ["", ""]
    outs = [out for out, _ in said]
    assert sum("training a tokenizer" in out for out in outs) == 1 and sum("(made before)" in out for out in outs) == 1
    assert any("another process prepares" in out for out in outs)


def test_a_killed_preparation_goes_on_and_shards_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    for seconds in (0.3, 0.7, 1.1):
        child = subprocess.Popen(command(tmp_path, text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(command(tmp_path, text), env=plain, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    here = prepare_text(recipe(tmp_path, text, text__cache=tmp_path / "other")).shards.folder
    assert digests(here) == digests(tmp_path / "data" / "shards" / here.name)


def test_the_command_prepares_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    ended = subprocess.run(command(tmp_path, text), capture_output=True, text=True)
    assert ended.returncode == 0 and "tokens: " in ended.stdout and ended.stderr == ""
    ended = subprocess.run(command(tmp_path, tmp_path / "none.txt"), capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    lines: list[str] = []
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if not terminal:
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    show = Show(lines.append, True)
    assert list(show.over([10**6] * 4, "encoding", 4 * 10**6, int)) == [10**6] * 4
    assert ("encoding: 100%" in capsys.readouterr().err) == terminal
    assert lines == ([] if terminal else ["encoding: 3 of 4 MB, 4 s left, 0.2 MB/s"])


@pytest.mark.parametrize("verb", ["prepare", "sample", "evaluate", "verify", "show"])
def test_help_needs_neither_torch_nor_datasets_and_half_a_second_at_most(verb: str) -> None:
    code = f"import sys, llm.{verb}; sys.exit(bool({{'torch', 'datasets', 'pyarrow'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    before = os.times()
    subprocess.run([sys.executable, "-m", f"llm.{verb}", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.slow
def test_a_prepared_text_is_opened_and_trained_on_without_what_it_does_not_need(tmp_path: Path) -> None:
    text_file(tmp_path)
    prepare_text(recipe(tmp_path))
    code = """if True:
        import sys
        from pathlib import Path
        from llm.interop.pretrained import ready
        from llm.config.reading import load
        from llm.training.session import train
        train(load(Path(sys.argv[1]), sys.argv[2:]), ready)
        spared = "torch.distributed.tensor", "torch.distributed.fsdp", "pandas", "datasets", "wandb", "transformers"
        sys.exit(", ".join(name for name in spared if name in sys.modules) or None)
    """
    tiny = [
        "model.dim=32",
        "model.layers=1",
        "model.heads=2",
        "train.warmup=0",
        "tracking.wandb=off",
        "machine.precision=fp32",
    ]
    given = [*settings(tmp_path, "text.txt", {}), *tiny]
    ended = subprocess.run(
        [sys.executable, "-c", code, recipe_file(tmp_path), *given], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


@needs_wiki
def test_the_written_wikipedia_text_is_the_packaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wiki.txt"
    main(["--wiki", str(path), "--language", "es"])
    assert "CC BY-SA 4.0" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="--force"):
        main(["--wiki", str(path)])
    main(["--wiki", str(path), "--force"])
    for given, said in (
        (["--wiki", str(path), "--list"], "leave out the recipe and --list"),
        (["recipe.yaml", "--list", "--new-tokenizer"], "prepare no text"),
        (["recipe.yaml", "--force"], "are for --wiki"),
    ):
        with pytest.raises(RecipeError, match=said):
            main(given)
    small = {"text__cache": tmp_path / "data", "tokenizer__vocabulary": 1000}
    lines: list[str] = []
    written = prepare_text(recipe(tmp_path, path, **small), lines.append)
    packaged = prepare_text(recipe(tmp_path, **small, text__files="[wiki-leads]"), lines.append)
    assert written.shards.folder == packaged.shards.folder and written.shards.train.documents > 8000


@needs_wiki
def test_a_missing_extra_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(TextError, match=re.escape("pip install -e '.[wiki]'")):
        main(["--wiki", str(tmp_path / "wiki.txt")])


LONG_LINE = """if True:
    import resource, sys
    from pathlib import Path
    from llm.data.pipeline import prepare_text
    from llm.config.reading import load
    peaks = []
    for name in ("text.txt", "line.txt"):
        prepare_text(load(Path(sys.argv[1]), [*sys.argv[3:], f"text.files=[{sys.argv[2]}/{name}]"]))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_a_line_of_200_mb_is_prepared_within_300_mb(tmp_path: Path) -> None:
    text_file(tmp_path)
    words = [document.decode().strip() for document in DOCUMENTS]
    with (tmp_path / "line.txt").open("w", encoding="utf-8") as file:
        size = 0
        while size < 200_000_000:
            size += file.write(f"{words[size % 200]} {size} ")
    given = settings(tmp_path, "text.txt", {})
    ended = subprocess.run(
        [sys.executable, "-c", LONG_LINE, recipe_file(tmp_path), tmp_path, *given], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.splitlines()[-1]) < 300 << 10  # KiB above what the same needs for a small text
