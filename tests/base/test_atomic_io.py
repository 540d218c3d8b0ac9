"""Whatever fails, and at whichever durable operation, a name holds what it held before or all of what was to come."""

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.base import atomic_io, errors
from llm.base.errors import RefusedError

ROOT = Path(__file__).parents[2]
OPERATIONS = ("_write", "_write_at", "_flush", "_rename", "_remove")
OLD, NEW = b"old " * 1000, b"new" * 2000


# ---------------------------------------------------------------------------------------------- worlds


def write_bytes(folder: Path) -> None:
    atomic_io.write_bytes(folder / "file", NEW)


def write_chunks(folder: Path) -> None:
    atomic_io.write_chunks(folder / "file", iter([NEW[:7], memoryview(NEW)[7:]]))


def write_json(folder: Path) -> None:
    atomic_io.write_json(folder / "file", {"step": 1, "text": "é" * 100})


def write_below_new_folders(folder: Path) -> None:
    atomic_io.write_bytes(folder / "x" / "y" / "file", NEW)


def fill_a_folder(folder: Path) -> None:
    with atomic_io.draft_folder(folder / "new-folder") as draft:
        atomic_io.write_bytes(draft / "a", NEW)
        atomic_io.write_json(draft / "b", [1, 2])


def fill_a_folder_in_parts(folder: Path) -> None:
    with atomic_io.draft_folder(folder / "new-folder") as draft:
        atomic_io.write_bytes(draft / "a", bytes(len(NEW)))
        atomic_io.write_at(draft / "a", [(9, NEW[9:]), (0, memoryview(NEW)[:9])])


def replace_a_folder(folder: Path) -> None:
    with atomic_io.draft_folder(folder / "old-folder") as draft:
        atomic_io.write_bytes(draft / "a", NEW)


def remove_a_file(folder: Path) -> None:
    atomic_io.remove(folder / "file")


def remove_a_folder(folder: Path) -> None:
    atomic_io.remove(folder / "old-folder")


def open_lines(folder: Path) -> None:
    atomic_io.Lines(folder / "file", keep=lambda line: line["step"] < 3).close()


ACTS = [
    write_bytes,
    write_chunks,
    write_json,
    write_below_new_folders,
    fill_a_folder,
    fill_a_folder_in_parts,
    replace_a_folder,
    remove_a_file,
    remove_a_folder,
    open_lines,
]


def laid(folder: Path) -> Path:
    """A file, which is one of lines as well, and a folder with their old content."""
    (folder / "old-folder").mkdir(parents=True)
    (folder / "file").write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(5)) + b'{"st')
    (folder / "old-folder" / "a").write_bytes(OLD)
    (folder / "old-folder" / "b").write_bytes(OLD)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Files by name, but for drafts."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(atomic_io.DRAFT) for part in name.parts)
    }


def before_and_after(act: Callable[[Path], None], folder: Path) -> list[dict[str, bytes]]:
    """What may be met under the final names, the content after the undisturbed `act` as the last."""
    old = content(laid(folder))
    act(folder)
    new = content(folder)
    assert old != new
    if (
        act is replace_a_folder
    ):  # no system gives a folder the name of another that is there: for a moment there is none
        return [old, {"file": old["file"]}, new]
    return [old, new]


def drafts(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{atomic_io.DRAFT}*"))


def sweep(folder: Path) -> None:
    """Sweep every place at which the acts above work."""
    for place in (folder, folder / "x", folder / "x" / "y"):
        atomic_io.sweep(place)
    assert not drafts(folder)


# ---------------------------------------------------------------------------------------------- faults


@contextlib.contextmanager
def fault(at: int, when: str, fail: Callable[[], None]) -> Iterator[list[str]]:
    """Let durable operation number `at`, from 0, `fail` before it is done, half done, or after. Yields those begun."""
    begun: list[str] = []
    real = {name: getattr(atomic_io, name) for name in OPERATIONS}

    def guarded(name: str) -> Callable[..., None]:
        def operation(*arguments: Any) -> None:
            begun.append(name)
            if len(begun) != at + 1:
                return real[name](*arguments)
            if when == "half" and name == "_write":
                arguments[0].write_bytes(half(arguments[1]))
            elif when == "half" and name == "_write_at":
                real[name](arguments[0], list(arguments[1])[:1])
            elif when == "half" and name == "_remove" and arguments[0].is_dir():
                next(arguments[0].iterdir()).unlink()
            elif when == "after":
                real[name](*arguments)
            return fail()

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(atomic_io, name, guarded(name))
        yield begun


def half(chunks: Iterable[bytes | memoryview]) -> bytes:
    data = b"".join(chunks)
    return data[: len(data) // 2]


def operations(act: Callable[[Path], None], folder: Path) -> list[str]:
    """The durable operations of an undisturbed `act`, in their order."""
    with fault(-1, "never", lambda: None) as begun:
        act(laid(folder))
    return begun


def test_every_durable_operation_is_met(tmp_path: Path) -> None:
    one_file = ["_write", "_flush", "_rename", "_flush"]
    assert operations(write_bytes, tmp_path / "1") == one_file
    assert operations(write_below_new_folders, tmp_path / "2") == ["_flush", "_flush", *one_file]
    assert operations(fill_a_folder, tmp_path / "3") == [*one_file, *one_file, "_flush", "_rename", "_flush"]
    assert operations(remove_a_folder, tmp_path / "4") == ["_rename", "_remove"]
    assert operations(open_lines, tmp_path / "6") == one_file
    assert operations(fill_a_folder_in_parts, tmp_path / "5")[4:6] == ["_write_at", "_flush"]


@pytest.mark.parametrize(
    ("when", "code"), [("before", errno.ENOSPC), ("half", errno.ENOSPC), ("half", errno.EIO), ("after", errno.EIO)]
)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_failing_disk_leaves_the_old_or_the_new(
    tmp_path: Path, act: Callable[[Path], None], when: str, code: int
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    allowed = before_and_after(act, tmp_path / "whole")
    for at in range(len(operations(act, tmp_path / "counted"))):
        folder = laid(tmp_path / str(at))
        with fault(at, when, fail), pytest.raises(OSError, match=os.strerror(code)):
            act(folder)
        assert content(folder) in allowed, at
        removes = act in (remove_a_file, remove_a_folder, replace_a_folder)
        assert removes or not drafts(folder), "who lives on leaves nothing unfinished behind"
        sweep(folder)
        assert content(folder) in allowed, at
        if content(folder) != allowed[-1]:
            act(folder)  # as the same command will, when there is room again
        assert content(folder) == allowed[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="victims are forked")
def test_kill_at_any_durable_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    # One process forks all the victims: it has no threads, and what they need is imported once.
    script = """
        import os, signal, sys
        from pathlib import Path
        from tests.base.test_atomic_io import ACTS, fault, laid

        for act in ACTS:
            for when in ("before", "half", "after"):
                for at in range(100):
                    folder = laid(Path(sys.argv[1], act.__name__, when, str(at)))
                    if not (victim := os.fork()):
                        with fault(at, when, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                            act(folder)
                        os._exit(0)
                    if os.waitpid(victim, 0)[1] == 0:
                        break
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    for act in ACTS:
        allowed = before_and_after(act, tmp_path / "whole" / act.__name__)
        moments = len(operations(act, tmp_path / "counted" / act.__name__))
        for when in ("before", "half", "after"):
            folders = [tmp_path / act.__name__ / when / str(at) for at in range(moments + 1)]
            for folder in folders:
                assert content(folder) in allowed, folder
                sweep(folder)
                assert content(folder) in allowed, folder
            assert content(folders[-1]) == allowed[-1], "as nobody killed that one"


@pytest.mark.parametrize("seed", range(8))
def test_kill_at_any_instant_leaves_whole_files_and_folders(tmp_path: Path, seed: int) -> None:
    script = """
        import sys
        from pathlib import Path
        from llm.base import atomic_io as store

        folder, size = Path(sys.argv[1]), 300_000
        for turn in range(1_000_000):
            store.write_bytes(folder / "file", bytes([turn % 256]) * size)
            with store.draft_folder(folder / f"folder-{turn}") as draft:
                for name in "abc":
                    store.write_bytes(draft / name, bytes([turn % 256]) * size)
            if turn >= 2:
                store.remove(folder / f"folder-{turn - 2}")
            print(turn, flush=True)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None and victim.stdout.readline() == "0\n"
        time.sleep(random.Random(seed).uniform(0, 0.1))
        victim.kill()
        done = int(("0\n" + victim.stdout.read()).split()[-1])
    atomic_io.sweep(tmp_path)
    assert not drafts(tmp_path)
    data = (tmp_path / "file").read_bytes()
    assert data == data[:1] * 300_000
    turns = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("folder-*"))
    assert done in turns, "what was said to be done is there"
    for turn in turns:
        files = {path.name: path.read_bytes() for path in (tmp_path / f"folder-{turn}").iterdir()}
        assert files == dict.fromkeys("abc", bytes([turn % 256]) * 300_000)


def test_a_folder_that_fails_while_it_is_filled_is_never_there(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_io.draft_folder(tmp_path / "folder") as draft:
            atomic_io.write_bytes(draft / "a", NEW)
            assert not (tmp_path / "folder").exists()
            raise error
        assert list(tmp_path.iterdir()) == []


def test_sweeping_takes_drafts_only(tmp_path: Path) -> None:
    before = content(laid(tmp_path))
    (tmp_path / f"{atomic_io.DRAFT}a").mkdir()
    (tmp_path / f"{atomic_io.DRAFT}a" / "b").write_bytes(NEW)
    (tmp_path / f"{atomic_io.DRAFT}c").write_bytes(NEW)
    (tmp_path / f"{atomic_io.DRAFT}d").symlink_to(tmp_path / "old-folder", target_is_directory=True)
    atomic_io.sweep(tmp_path)
    atomic_io.sweep(tmp_path / "nowhere")
    assert not drafts(tmp_path)
    assert content(tmp_path) == before


# ---------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("value", [None, {"b": 1, "a": [1.5, "é\n\0 \U0001f600"]}, [], "text"], ids=str)
def test_json_comes_back_as_it_was(tmp_path: Path, value: Any) -> None:
    atomic_io.write_json(tmp_path / "value.json", value)
    assert atomic_io.read_json(tmp_path / "value.json") == value
    assert json.dumps(atomic_io.read_json(tmp_path / "value.json")) == json.dumps(value), "in the order given"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"step": 1',
        b"\0" * 100,
        b"\xff\xfe\xfd",
        b'"\xe9"',
        b"step: 1",
        b"9" * 5000,
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda data: str(data[:10]),
)
def test_json_that_is_damaged_or_made_to_hurt_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "value.json").write_bytes(data)
    with pytest.raises(RefusedError, match=r"value\.json is damaged: not JSON"):
        atomic_io.read_json(tmp_path / "value.json")


def test_json_that_is_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "value.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RefusedError, match=r"more than any file of ours"):
        atomic_io.read_json(tmp_path / "value.json")
    (tmp_path / "value.json").write_bytes(b"[1, 2, 3]")
    with pytest.raises(RefusedError):
        atomic_io.read_json(tmp_path / "value.json", most_bytes=8)


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert atomic_io.digest_of({"a": 1, "b": [1, 2]}) == atomic_io.digest_of({"b": [1, 2], "a": 1})
    assert len({atomic_io.digest_of(value) for value in ({"a": 1}, {"a": "1"}, {"a": 1.0}, ["a", 1], {"a": [1]})}) == 5


# ---------------------------------------------------------------------------------------------- lines


def lines_of(path: Path) -> list[dict[str, Any]]:
    return list(atomic_io.read_lines(path))


def test_a_line_that_was_left_half_written_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    lines = atomic_io.Lines(path)
    written = [{"step": step, "sample": "é\n\u2028"} for step in range(3)]
    for line in written:
        lines.append(line)
        assert lines_of(path)[-1] == line, "it has reached the operating system"
    lines.flush()
    lines.close()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole) + 1):
        path.write_bytes(whole[:length])
        again = atomic_io.Lines(path)
        again.append({"step": 9})
        again.close()
        kept = written if length >= len(whole) - 1 else written[:2]
        assert lines_of(path) == [*kept, {"step": 9}]
        assert path.read_bytes().endswith(b'}\n{"step": 9}\n')


@pytest.mark.parametrize("damage", [b"\0" * 4096, b'{"step": 1}\xff\xe9', b"[" * 100_000, b"7\n[]\nnull\n"], ids=repr)
def test_what_is_no_line_of_ours_is_dropped(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage)
    lines = atomic_io.Lines(path)
    lines.append({"step": 2})
    lines.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_lines_past_the_checkpoint_are_taken_out_and_others_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": NaN}}\n' for step in range(5)))
    before = path.stat()
    atomic_io.Lines(path).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    atomic_io.Lines(path, keep=lambda line: line["step"] <= 2).close()
    assert [line["step"] for line in lines_of(path)] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- locks

HOLDER = """
    import sys, time
    from pathlib import Path
    from llm.base import atomic_io as store

    with store.lock(Path(sys.argv[1])) as mine:
        print(mine, flush=True)
        time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def holder(path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(path), str(seconds)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_lock_is_another_s_until_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "lock"
    with holder(path, seconds=60) as process:
        with atomic_io.lock(path) as mine:
            assert not mine
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        with atomic_io.lock(path) as mine:
            assert mine


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, seconds=0.3) as process, atomic_io.lock(path, wait=True) as mine:
        assert mine
        assert process.wait(timeout=10) == 0, "the holder let go of it"


def test_a_lock_is_free_after_its_block_however_it_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_io.lock(tmp_path / "lock") as mine:
        assert mine
        with atomic_io.lock(tmp_path / "lock") as again:
            assert not again, "held once, also within a process"
        raise ValueError
    with atomic_io.lock(tmp_path / "lock") as mine:
        assert mine


# ---------------------------------------------------------------------------------------------- exit status


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (errors.RecipeError("seed = x"), 2, "error: seed = x"),
        (errors.TextError("no text"), 2, "error: no text"),
        (errors.DivergedError("nan"), 3, "error: nan"),
        (errors.RefusedError("damaged"), 4, "error: damaged"),
        (errors.DiskError("full"), 5, "error: full"),
        (errors.GroupError("rank 1"), 6, "error: rank 1"),
        (errors.StoppedError("saved"), 75, "saved"),
        (errors.LLMError("other"), 1, "error: other"),
        (errors.RecipeError("a\nb\r\x1b[31m\u2028\ud800é"), 2, r"error: a\nb\r\x1b[31m\u2028\ud800é"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "", "metrics.jsonl"), 5, f"at metrics.jsonl: {os.strerror(errno.ENOSPC)}, "),
        (OSError(errno.EIO, ""), 5, f"error: the disk failed: {os.strerror(errno.EIO)}"),
        (OSError(errno.EDQUOT, ""), 5, "error: the disk failed"),
        (OSError(errno.EROFS, ""), 5, "error: the disk failed"),
        (SystemExit(2), 2, ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_each_error_is_one_line_and_its_own_status(
    capsys: pytest.CaptureFixture[str], raised: BaseException, status: int, said: str
) -> None:
    def main() -> None:
        raise raised

    with pytest.raises(SystemExit) as exit:
        errors.run(main)
    assert exit.value.code == status
    out, err = capsys.readouterr()
    assert not out
    assert said in err and err.count("\n") == (1 if said else 0)


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_what_main_returns_is_the_status(returned: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: returned)
    assert exit.value.code == status


@pytest.mark.parametrize("raised", [AssertionError("ours"), ValueError("ours"), FileNotFoundError(2, "ours")], ids=repr)
def test_what_we_got_wrong_keeps_its_traceback(raised: Exception) -> None:
    def main() -> None:
        raise raised

    with pytest.raises(type(raised), match="ours"):
        errors.run(main)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full disk is Linux's /dev/full")
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("{python} -c '{script}' few | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{python} -c '{script}' many | head -n 1 > /dev/null; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{python} -c '{script}' few > /dev/full", 5, "error: the disk failed"),
        ("{python} -c '{script}' many > /dev/full", 5, "error: the disk failed"),
    ],
)
def test_a_reader_that_leaves_is_no_failure_and_a_full_disk_is_one(command: str, status: int, said: str) -> None:
    script = (
        "import sys, time; from llm.base.errors import run; "
        'run(lambda: print("word " * (1 if time.sleep(0.2) or "few" in sys.argv else 1_000_000)))'
    )
    arguments = ["bash", "-c", command.format(python=sys.executable, script=script)]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr and ended.stderr.count("\n") == (1 if said else 0)


# ---------------------------------------------------------------------------------------------- network file systems


def refuses(code: int, real: Callable[..., Any], when: Callable[[int], bool]) -> Callable[..., Any]:
    """A call of the system that fails so on the handles for which `when` holds."""

    def call(handle: int, *given: Any) -> Any:
        if when(handle):
            raise OSError(code, os.strerror(code))
        return real(handle, *given)

    return call


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_no_fault_unless_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "fsync", refuses(code, os.fsync, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode)))
    with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
        atomic_io.write_bytes(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_in_the_file_system_a_file_names_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("fcntl.flock", refuses(code, fcntl.flock, lambda handle: True))
    path = tmp_path / "lock"
    child = os.fork()
    if not child:
        with atomic_io.lock(path) as mine:
            (tmp_path / f"held-{mine}").touch()
            time.sleep(60)
        os._exit(0)
    while not list(tmp_path.glob("held-*")):
        time.sleep(0.01)
    with atomic_io.lock(path) as mine:
        assert not mine and (tmp_path / "held-True").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with atomic_io.lock(path, wait=True) as mine:
        assert mine
    with atomic_io.lock(path) as mine:
        assert mine


def test_a_place_without_what_is_needed_is_one_line_with_status_5() -> None:
    for code in (errno.ENOTSUP, errno.ENOLCK, errno.ESTALE):
        error = errors.as_disk_error(OSError(code, os.strerror(code), "file"))
        assert error is not None and error.status == 5 and "another disk" in str(error)


def test_a_home_that_is_not_there_is_refused_by_the_name_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(errors.RecipeError, match="~ has no home folder here"):
        atomic_io.expanded("~/text.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.RecipeError, match=r"~notes.txt is not there, and there is no user 'notes.txt'"):
        atomic_io.expanded("~notes.txt")
    (tmp_path / "~notes.txt").touch()
    assert atomic_io.expanded("~notes.txt") == Path("~notes.txt")


@pytest.mark.parametrize("lacks", ["nothing", "O_DIRECT", "opening past the page cache", "writing past it"])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_length_lie_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, seed: int
) -> None:
    """Pieces of a byte and of several stages, in any order, with gaps that others fill."""
    monkeypatch.setattr(atomic_io, "STAGE", 4 * atomic_io.BLOCK)
    draw, path, size = random.Random(seed), tmp_path / "file", 200_000
    real_open, real_write, past = os.open, os.write, set()

    def opened(name: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and lacks.startswith("opening"):
            raise OSError(errno.EINVAL, "not supported")
        handle = real_open(name, flags, *mode)
        if flags & os.O_DIRECT:
            past.add(handle)
        return handle

    def written(handle: int, data: memoryview) -> int:
        if handle in past and lacks.startswith("writing"):
            raise OSError(errno.EINVAL, "not supported")
        return real_write(handle, data[: draw.choice([len(data), 2 * atomic_io.BLOCK])])

    expected, at, chunks = bytearray(draw.randbytes(size)), 0, []
    path.write_bytes(expected)
    while at < size:
        gap, length = draw.choice([0, 0, 5, 4096]), draw.choice([1, 100, 4096, 10_000, 50_000])
        data = draw.randbytes(min(length, max(0, size - at - gap)))
        expected[at + gap : at + gap + len(data)] = data
        chunks.append((at + gap, memoryview(data)))
        at += gap + length
    if seed % 2:
        draw.shuffle(chunks)
    with monkeypatch.context() as patch:
        if lacks == "O_DIRECT":
            patch.delattr(os, "O_DIRECT", raising=False)
        else:
            patch.setattr(os, "open", opened)
            patch.setattr(os, "write", written)
        atomic_io.write_at(path, chunks)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("data", [b'{"x": 1e999}', b'{"x": "\\ud800"}', b'{"x": 1}', b"[]"])
def test_what_is_json_and_not_as_we_write_it_is_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(RefusedError, match="damaged"):
        atomic_io.read_checksummed(tmp_path / "file.json")
