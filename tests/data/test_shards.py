"""Shards hold each document once, BOS before it; windows are views; a kill loses no finished file; damage is seen."""

import copy
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm.base import atomic_io
from llm.base.errors import GroupError, RefusedError
from llm.data import shard_writer, shards
from llm.data.documents import fraction
from llm.data.shards import Shards, Split
from llm.data.sources import wiki_documents
from llm.data.tokenizer import Tokenizer
from tests.data.test_documents import needs_wiki
from tests.data.test_tokenizer import DOCUMENTS

SHARE = 0.2
TEXT = [f"{number} ".encode() + DOCUMENTS[number % 200] * (1 + number % 3) for number in range(600)]  # all differ


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, vocab_size=320)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "FILE", 60_000)
    monkeypatch.setattr(shard_writer, "BLOCK", 9_000)


def write(folder: Path, tokenizer: Tokenizer, documents: list[bytes] = TEXT, processes: int = 0) -> Shards:
    done = list(
        shard_writer.write(
            documents, folder, tokenizer, val_fraction=SHARE, about={"fingerprint": "f"}, processes=processes
        )
    )
    assert sum(done) == sum(map(len, documents))
    return Shards.open(folder, verify=True)


def texts(side: Split, tokenizer: Tokenizer) -> list[bytes]:
    bounds = [*side.document_starts().tolist(), side.tokens]
    return [tokenizer.decode(side.read(a, b).tolist()).encode() for a, b in itertools.pairwise(bounds)]


def files(folder: Path) -> dict[str, str]:
    return {path.name: atomic_io.sha256(path) for path in folder.iterdir()}


def test_each_side_holds_its_documents_in_order_and_no_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = write(tmp_path / "s", tokenizer)
    assert texts(opened.train, tokenizer) == [each for each in TEXT if fraction(each) >= SHARE]
    assert texts(opened.validation, tokenizer) == [each for each in TEXT if fraction(each) < SHARE]
    assert opened.train.text_bytes + opened.validation.text_bytes == sum(map(len, TEXT))
    assert opened.train.documents + opened.validation.documents == len(TEXT)
    assert len(opened.manifest["files"]["train"]) > 3 and not (tmp_path / "s" / "journal.json").exists()


def test_the_files_are_the_same_whatever_the_number_of_processes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "0", tokenizer)
    for processes in (1, 3):
        write(tmp_path / str(processes), tokenizer, processes=processes)
        assert files(tmp_path / str(processes)) == files(tmp_path / "0")


def test_a_lost_process_is_one_line_and_the_same_call_goes_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "whole", tokenizer)
    writing = shard_writer.write(
        TEXT, tmp_path / "s", tokenizer, val_fraction=SHARE, about={"fingerprint": "f"}, processes=2
    )
    done = itertools.islice(writing, 12)
    assert sum(done) and len(children(os.getpid())) == 2
    root = os.fsencode(Path(shards.__file__).parents[2])  # the package that is running, not another that is installed
    for child in children(os.getpid()):
        assert root in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        os.kill(child, signal.SIGKILL)
    with pytest.raises(GroupError, match=r"encodes text ended with status -9.*same command again"):
        list(writing)
    assert not children(os.getpid()) and files(tmp_path / "s")
    write(tmp_path / "s", tokenizer, processes=2)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def children(parent: int) -> list[int]:
    """The processes of `parent` that encode."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    each = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in each if b"llm.data.encoding" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_there_are_as_many_bos_as_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = write(tmp_path, tokenizer)
    for side in (opened.train, opened.validation):
        tokens = side.read(0, side.tokens)
        assert np.array_equal(np.flatnonzero(tokens == tokenizer.bos), side.document_starts())
        assert len(side.document_starts()) == side.documents


def test_a_window_is_a_view_unless_files_meet_in_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    side = write(tmp_path, tokenizer).train
    whole, edge = side.read(0, side.tokens), int(side._begins[1])
    assert whole.dtype == np.uint16 and len(whole) == side.tokens
    rng = np.random.default_rng(1)
    for start in [0, edge - 1, edge, edge - 64, side.tokens - 65, *rng.integers(0, side.tokens - 65, 200).tolist()]:
        assert np.array_equal(side.read(start, start + 65), whole[start : start + 65])
    assert np.shares_memory(side.read(3, 60), side.read(0, 65))
    assert len(side.read(5, 5)) == len(side.read(side.tokens, side.tokens)) == 0
    for start, stop in ((-1, 5), (5, 4), (side.tokens - 1, side.tokens + 1)):
        with pytest.raises(IndexError):
            side.read(start, stop)


def test_datasets_opens_a_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import datasets

    opened = write(tmp_path, tokenizer)
    rows = datasets.Dataset.from_file(str(tmp_path / "train-00000.arrow"))
    assert rows[0]["tokens"] == opened.train.read(0, len(rows[0]["tokens"])).tolist()


def test_a_large_vocabulary_takes_wider_integers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = copy.copy(tokenizer)
    large.vocab_size = 70_000
    assert write(tmp_path, large).train.read(0, 9).dtype == np.uint32


def test_one_side_may_be_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    validation = write(tmp_path, tokenizer, [each for each in TEXT if fraction(each) >= SHARE]).validation
    assert validation.tokens == validation.documents == len(validation.document_starts()) == 0
    assert validation.read(0, 0).dtype == np.uint16


@needs_wiki
def test_the_packaged_text_is_split_once_and_comes_back(tmp_path: Path) -> None:
    documents = list(wiki_documents("en-us"))
    tokenizer = Tokenizer.train(documents[::10], vocab_size=1000)
    opened = write(tmp_path, tokenizer, documents)
    train, validation = texts(opened.train, tokenizer), texts(opened.validation, tokenizer)
    assert len(train) + len(validation) == len(documents) and not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)


CHILD = """if True:
    import json, sys, time
    from pathlib import Path
    from llm.data import shard_writer
    from llm.data.tokenizer import Tokenizer
    folder = Path(sys.argv[1])
    shard_writer.FILE, shard_writer.BLOCK = 60_000, 9_000
    documents = [text.encode() for text in json.loads((folder / "text.json").read_text("utf-8"))]
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    about, processes = {"fingerprint": "f"}, int(sys.argv[2])
    for _ in shard_writer.write(documents, folder / "shards", tokenizer, val_fraction=0.2, about=about, processes=processes):
        time.sleep(0.03)
"""


def test_a_killed_writing_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "whole", tokenizer)
    tokenizer.save(tmp_path)
    (tmp_path / "text.json").write_text(json.dumps([each.decode() for each in TEXT]), encoding="utf-8")
    folder, finished = tmp_path / "shards", 0
    journal = folder / "journal.json"
    for more in (1, 2, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path, str(more - 1)])
        while child.poll() is None and (not journal.exists() or len(journal.read_text().split("sha256")) - 1 < more):
            time.sleep(0.01)
        encoders = children(child.pid)
        assert len(encoders) == more - 1
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and not (folder / "manifest.json").exists()
        while any(Path(f"/proc/{encoder}/cwd").exists() for encoder in encoders):  # they end with their parent
            time.sleep(0.01)
        kept = [file["name"] for side in json.loads(journal.read_text()).values() for file in side]
        assert len(kept) >= max(more, finished)
        finished = len(kept)
    (folder / ".draft-train-00099.arrow-0").write_bytes(b"left by a kill in the middle of a file")
    times = {name: (folder / name).stat().st_mtime_ns for name in kept}
    write(folder, tokenizer)
    assert files(folder) == files(tmp_path / "whole")
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == times  # not written again


@pytest.mark.parametrize("at", range(12))
def test_a_failing_disk_loses_no_finished_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Every third operation of the store fails in its turn; then the same call ends in the same bytes."""
    calls = 0

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def operation(*given: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 1 + 3 * at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*given)

        return operation

    with monkeypatch.context() as patch:
        for name in ("_write", "_flush", "_rename"):
            patch.setattr(atomic_io, name, failing(getattr(atomic_io, name)))
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "s", tokenizer)
    write(tmp_path / "s", tokenizer)
    write(tmp_path / "whole", tokenizer)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_a_damaged_file_of_a_killed_writing_is_made_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = files(write(tmp_path, tokenizer).folder)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "journal.json").write_text(json.dumps(manifest["files"]))
    (tmp_path / "manifest.json").unlink()
    flip(tmp_path / "train-00001.arrow", 500)
    write(tmp_path, tokenizer)
    assert files(tmp_path) == whole


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = write(tmp_path / "whole", tokenizer).folder

    def damaged(name: str) -> Path:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        return shutil.copytree(whole, tmp_path / "s") / name

    flip(damaged("train-00001.arrow"), 20_000)
    Shards.open(tmp_path / "s")  # a flipped token is not seen without reading it
    with pytest.raises(RefusedError, match=r"train-00001\.arrow is missing or damaged \(sha256\)"):
        Shards.open(tmp_path / "s", verify=True)
    path = damaged("validation-00000.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RefusedError, match=r"validation-00000\.arrow is missing or is not \d+ bytes long"):
        Shards.open(tmp_path / "s")
    damaged("train-00000.arrow").unlink()
    with pytest.raises(RefusedError, match=r"train-00000\.arrow is missing"):
        Shards.open(tmp_path / "s")
    path = damaged("train-00000.arrow")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(RefusedError, match=r"train-00000\.arrow"):
        Shards.open(tmp_path / "s")
    path = damaged("manifest.json")
    path.write_text(path.read_text().replace('"documents": 1', '"documents": 2', 1))
    with pytest.raises(RefusedError, match=r"manifest\.json is damaged"):
        Shards.open(tmp_path / "s")
    damaged("manifest.json").unlink()
    with pytest.raises(RefusedError, match="no finished shards"):
        Shards.open(tmp_path / "s")
