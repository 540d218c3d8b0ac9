"""Machines of one launch encode a text together: each its share, every disk with the bytes of a single process."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm.interop.pretrained
from llm.base import atomic_io
from llm.base.errors import GroupError, LLMError, TextError
from llm.config.reading import load
from llm.data import documents, mixed_pipeline, pipeline, shard_writer, survey
from llm.data.shards import SIDES, AnyShards
from tests.data.test_growth import MANY, MARKER
from tests.data.test_pipeline import digests, settings
from tests.forks import run_group, train, write_recipe

FILE, BLOCK = 20_000, 4_000


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "FILE", FILE)
        patch.setattr(shard_writer, "BLOCK", BLOCK)
        patch.setattr(survey, "SEGMENT", 30_000)
        patch.setattr(pipeline, "LARGE", 100_000)
        patch.setattr(pipeline, "cores", lambda: 1)
        yield


class Hall:
    """Where the machines meet that are threads here."""

    def __init__(self, machines: int) -> None:
        self.barrier, self.parts = threading.Barrier(machines, timeout=60), [b""] * machines


class Seat:
    """The place of one machine in a team."""

    def __init__(self, hall: Hall, rank: int, writes: bool) -> None:
        self.hall, self.rank, self.writes, self.ranks = hall, rank, writes, list(range(len(hall.parts)))

    def exchange(self, part: bytes) -> list[bytes]:
        self.hall.parts[self.rank] = part
        self.hall.barrier.wait()
        found = list(self.hall.parts)
        self.hall.barrier.wait()
        return found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The bytes of text that each machine encodes."""
    sizes: Counter[str] = Counter()
    for kind in (shard_writer.LocalEncoder, shard_writer.ConversationEncoder):

        def counted(self: Any, text: bytes, lengths: np.ndarray, encode: Any = kind.encode) -> Any:
            sizes[threading.current_thread().name] += len(text)
            return encode(self, text, lengths)

        monkeypatch.setattr(kind, "encode", counted)
    return sizes


def alone(folder: Path, text: Path | str, **changes: object) -> AnyShards:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("text: {files: [text.txt]}\ntrain: {steps: 1}\n", encoding="utf-8")
    return mixed_pipeline.prepare(load(folder / "recipe.yaml", settings(folder, text, changes)), print).shards


def together(
    folders: list[Path], texts: Path | str | list[Path], **changes: object
) -> tuple[list[AnyShards | LLMError], str]:
    """What machines with these folders come to, equal ones being one disk; what the first of them says."""
    hall = Hall(len(folders))
    found: list[Any] = [None] * len(folders)
    said: list[str] = []

    def machine(rank: int) -> None:
        folder, text = folders[rank], texts[rank] if isinstance(texts, list) else texts
        seat = Seat(hall, rank, folders.index(folder) == rank)
        recipe = load(folder / "recipe.yaml", settings(folder, text, changes))
        try:
            tell = said.append if rank == 0 else print
            found[rank] = mixed_pipeline.prepare(recipe, tell, team=seat).shards
        except BaseException as error:
            found[rank] = error
            if not isinstance(error, GroupError):
                hall.barrier.abort()

    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text("text: {files: [text.txt]}\ntrain: {steps: 1}\n", encoding="utf-8")
    machines = [threading.Thread(target=machine, args=[rank], name=str(rank)) for rank in range(len(folders))]
    for each in machines:
        each.start()
    for each in machines:
        each.join()
    return found, "\n".join(said)


def text_of(folder: Path, documents: list[bytes] = MANY) -> Path:
    path = folder / "text.txt"
    path.write_bytes(b"".join(each + MARKER for each in documents))
    return path


def folders_of(folder: Path, shape: str) -> list[Path]:
    """Machines by the letters of their disks."""
    return [folder / disk for disk in shape]


@pytest.mark.parametrize("shape", ["ab", "aa", "abc", "aab", "aaaaa"])
def test_each_machine_encodes_its_share_and_every_disk_has_the_same_bytes(
    tmp_path: Path, encoded: Counter[str], shape: str
) -> None:
    text = text_of(tmp_path)
    whole = alone(tmp_path / "alone", text)
    expected, size = digests(whole.folder), sum(encoded.values())  # type: ignore[union-attr]
    assert sum(len(whole.manifest["files"][side]) for side in SIDES) > 8  # type: ignore[union-attr]
    encoded.clear()
    found, said = together(folders_of(tmp_path, shape), text)
    for folder, shards in zip(folders_of(tmp_path, shape), found, strict=True):
        assert shards.folder.is_relative_to(folder) and digests(shards.folder) == expected
    assert sum(encoded.values()) == size and len(encoded) == len(shape)
    assert all(abs(each - size / len(shape)) < 2.5 * BLOCK for each in encoded.values())
    parts = " + ".join(f"{encoded[str(rank)] / 1e6:,.1f}" for rank in range(len(shape)))
    assert f"encoding: {parts} MB on {len(shape)} machines" in said.splitlines()
    encoded.clear()
    again, said = together(folders_of(tmp_path, shape), text)
    assert not encoded and "(made before)" in said and "machines" not in said
    assert [each.fingerprint for each in again] == [whole.fingerprint] * len(shape)


def interrupted(folder: Path, *kept: int) -> dict[str, int]:
    """As a kill would have left these shards, with so many files of each side finished; when those were written."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {side: manifest["files"][side][:count] for side, count in zip(SIDES, kept, strict=True)}
    (folder / "manifest.json").unlink()
    (folder / "journal.json").write_text(json.dumps(files))
    names = [file["name"] for side in SIDES for file in files[side]]
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def test_machines_that_were_killed_at_different_places_go_on_where_the_first_is_needed(
    tmp_path: Path, encoded: Counter[str]
) -> None:
    text = text_of(tmp_path)
    expected = digests(alone(tmp_path / "alone", text).folder)  # type: ignore[union-attr]
    folders = folders_of(tmp_path, "abcd")
    found, _ = together(folders, text)
    kept = [interrupted(found[0].folder, 9, 0), interrupted(found[1].folder, 5, 1), {}, {}]
    shutil.rmtree(found[2].folder.parent.parent)  # and the third has a new disk, the fourth all of them
    encoded.clear()
    found, _ = together(folders, text)
    assert len(encoded) == 4, "one that has all of it encodes too"
    for shards, times in zip(found, kept, strict=True):
        assert digests(shards.folder) == expected
        assert {name: (shards.folder / name).stat().st_mtime_ns for name in times} == times, "none is written again"
    whole = sum(encoded.values())
    interrupted(found[0].folder, 9, 1)
    interrupted(found[1].folder, 5, 1)
    encoded.clear()
    found, _ = together(folders[:2], text)
    assert [digests(each.folder) for each in found] == [expected] * 2
    assert 0 < sum(encoded.values()) < whole - 4 * FILE, "what all have is not encoded again"


def test_a_text_that_has_grown_is_encoded_where_it_is_new(tmp_path: Path, encoded: Counter[str]) -> None:
    text, folders = text_of(tmp_path), folders_of(tmp_path, "aab")
    together(folders, text)
    new = [b"%d is new\n" % number + each for number, each in enumerate(MANY[:300])]
    text_of(tmp_path, [*MANY[:200], *new[:150], *MANY[210:], *new[150:]])
    encoded.clear()
    found, said = together(folders, text)
    assert sum(encoded.values()) == sum(map(len, new)) and len(encoded) == 3
    assert "text: 300 documents" in said and "10 are gone" in said
    # Another machine, with the same tokenizer, has none of it: all is encoded, and linked files stay.
    model = next((tmp_path / "a/data/tokenizers").glob("*/tokenizer.model"))
    scratch = alone(tmp_path / "scratch", text, tokenizer__path=model)
    assert digests(scratch.folder) == digests(found[0].folder) == digests(found[2].folder)  # type: ignore[union-attr]
    together(folders_of(tmp_path, "e"), text, tokenizer__path=model)
    text_of(tmp_path, [*MANY[:200], *new[:150], *MANY[210:], *new[150:], b"and one more\n"])
    mixed, _ = together(folders_of(tmp_path, "ef"), text, tokenizer__path=model)
    assert digests(mixed[0].folder) == digests(mixed[1].folder)
    assert digests(mixed[0].folder) == digests(alone(tmp_path / "more", text, tokenizer__path=model).folder)  # type: ignore[union-attr]


def test_conversations_and_mixtures_are_shared_too(tmp_path: Path, encoded: Counter[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": each.decode()}, {"role": "assistant", "content": str(n)}]}
        for n, each in enumerate(MANY[:400])
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "text__files": "[]",
        "text__sources__one__files": f"[{text_of(tmp_path)}]",
        "text__sources__one__weight": 1,
    }
    sources |= {"text__sources__two__files": f"[{chat}]", "text__sources__two__weight": 1}
    whole = alone(tmp_path / "alone", "", **sources)
    size = sum(encoded.values())
    encoded.clear()
    found, _ = together(folders_of(tmp_path, "ab"), "", **sources)
    for each in found:
        for name, shards in each.sources.items():
            assert digests(shards.folder) == digests(whole.sources[name].folder)
    assert sum(encoded.values()) == size and max(encoded.values()) < 0.6 * size


def test_a_machine_with_another_text_is_refused_before_anything_is_encoded(
    tmp_path: Path, encoded: Counter[str]
) -> None:
    folders = folders_of(tmp_path, "abc")
    for folder in folders:
        folder.mkdir()
    texts = [text_of(folder, MANY if folder.name != "b" else MANY[:-1]) for folder in folders]
    found, _ = together(folders, texts)
    assert all(isinstance(each, GroupError) for each in found) and not encoded
    assert str(found[0]).startswith("process 1 has the text's fingerprint = ") and "process 0 has" in str(found[2])


def test_a_small_text_is_encoded_by_each_machine(
    tmp_path: Path, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "LARGE", 1 << 30)
    found, said = together(folders_of(tmp_path, "ab"), text_of(tmp_path))
    assert digests(found[0].folder) == digests(found[1].folder)
    assert encoded["0"] == encoded["1"] > 0 and "machines" not in said


def test_where_another_process_prepares_the_text_each_machine_waits_for_it(
    tmp_path: Path, encoded: Counter[str]
) -> None:
    text = text_of(tmp_path)
    whole = alone(tmp_path / "a", text)
    before = interrupted(whole.folder, 3, 0)  # type: ignore[union-attr]
    lock = tmp_path / "a/data/locks" / f"shards-{whole.fingerprint}.lock"
    with atomic_io.lock(lock) as mine:
        assert mine
        result: list[Any] = []
        waiting = threading.Thread(target=lambda: result.extend(together(folders_of(tmp_path, "ab"), text)))
        waiting.start()
        time.sleep(2)
        assert waiting.is_alive()
    waiting.join()
    found, said = result
    assert "another process prepares these token shards: waiting for it" in said
    assert before and digests(found[0].folder) == digests(found[1].folder)


# Real processes, which are told that they are two machines.


def machines(recipe: Path, disks: str, act: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """The launch script on a disk of each machine, after `act`."""

    def child() -> None:
        os.chdir(disks[int(os.environ["RANK"])])
        encode = shard_writer.LocalEncoder.encode
        sizes: list[int] = []

        def counted(self: Any, text: bytes, lengths: np.ndarray) -> Any:
            sizes.append(len(text))
            Path(f"../encoded-{os.environ['RANK']}").write_text(str(sum(sizes)))
            return encode(self, text, lengths)

        shard_writer.LocalEncoder.encode = counted  # type: ignore[method-assign]
        act()
        train(recipe)()

    return child


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, small_parts: None) -> dict[str, str]:
    """The shards that a single process makes of the text."""
    folder = tmp_path_factory.mktemp("alone")
    return digests(alone(folder, text_of(folder), text__validation=0.01).folder)  # type: ignore[union-attr]


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """A recipe, of a text beside it on each of two disks."""
    for disk in "ab":
        (tmp_path / disk).mkdir()
        text_of(tmp_path / disk)
    keys = {
        "train.steps": 1,
        "train.warmup": 0,
        "machine.micro_batch": 1,
        "text.validation": 0.01,
        "text.cache": "cache",
    }
    return write_recipe(tmp_path, Path("text.txt"), **keys)


def shards_on(disk: Path) -> dict[str, str]:
    return digests(next((disk / "cache/shards").glob("*")))


def encoded_by(folder: Path, rank: int) -> int:
    path = folder / f"encoded-{rank}"
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize("used", ["ab", "aa"])
@pytest.mark.parametrize("node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_machines_of_one_launch_each_encode_their_half(
    tmp_path: Path, disks: Path, expected: dict[str, str], used: str, node: int
) -> None:
    """Of one process each, or of two."""
    of_ranks = "".join(disk * node for disk in used)
    ended = run_group(machines(disks, of_ranks), tmp_path, 2 * node, node)
    assert [each.status for each in ended] == [0] * 2 * node, ended
    assert "MB on 2 machines" in ended[0].out
    halves = [encoded_by(tmp_path, rank) for rank in (0, node)]
    assert abs(halves[0] - halves[1]) < 2.5 * BLOCK and sum(halves) == sum(map(len, MANY))
    for disk in used:
        assert shards_on(tmp_path / disk) == expected


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("used", ["ab", pytest.param("aa", marks=pytest.mark.slow)])
def test_a_machine_that_dies_ends_the_others_and_the_same_command_goes_on(
    tmp_path: Path, disks: Path, expected: dict[str, str], used: str, dies: int
) -> None:
    def slow() -> None:
        encode = shard_writer.LocalEncoder.encode

        def late(self: Any, text: bytes, lengths: np.ndarray) -> Any:
            if os.environ["RANK"] == str(dies) and encoded_by(Path(".."), dies) > 120_000:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, text, lengths)

        shard_writer.LocalEncoder.encode = late  # type: ignore[method-assign]

    first = run_group(machines(disks, used, slow), tmp_path, 2, 1)
    assert first[dies].status == -signal.SIGKILL
    other = first[1 - dies]
    said = other.err.splitlines()[-1]  # torch may tell of its store before
    assert other.status == 6 and f"process {dies} {'(last heard of after round' if dies else 'is gone'}" in said, other
    done = run_group(machines(disks, used), tmp_path, 2, 1)
    assert [each.status for each in done] == [0, 0], done
    for disk in used:
        assert shards_on(tmp_path / disk) == expected
    again = sum(encoded_by(tmp_path, rank) for rank in (0, 1))
    assert again < sum(map(len, MANY)) - FILE, "what was in files is not encoded again"


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("when", ["while it encodes", "behind it"])
def test_a_machine_that_fails_says_why_and_the_other_ends_with_it(
    tmp_path: Path, disks: Path, fails: int, when: str
) -> None:
    def failing() -> None:
        if os.environ["RANK"] != str(fails):
            return
        read = documents.Corpus.documents

        def changing(*given: Any, **named: Any) -> Iterator[bytes]:
            for number, each in enumerate(read(*given, **named)):
                if number == 700 and "watch" not in named:
                    raise TextError("the text has changed")
                yield each

        def changed(*given: Any) -> None:
            raise TextError("the text has changed")

        if when == "behind it":
            llm.interop.pretrained.prompts.with_prompts = changed  # type: ignore[assignment]
        else:
            documents.Corpus.documents = changing  # type: ignore[method-assign]

    ended = run_group(machines(disks, "ab", failing), tmp_path, 2, 1)
    assert [each.status for each in ended] == [2, 2], ended
    assert "error: the text has changed" in ended[fails].err and len(ended[fails].err.splitlines()) == 1
    assert ended[1 - fails].err == ""


def test_a_machine_with_another_text_is_named_by_the_main_process(tmp_path: Path, disks: Path) -> None:
    text_of(tmp_path / "b", MANY[1:])
    ended = run_group(machines(disks, "ab"), tmp_path, 2, 1)
    assert [each.status for each in ended] == [6, 6], ended
    assert "process 1 has the text's fingerprint = " in ended[0].err and not ended[1].err
    assert not (tmp_path / "encoded-0").exists()
