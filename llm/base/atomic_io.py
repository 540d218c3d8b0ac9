"""Durable files: write a draft, flush it, rename it. A file or folder under its final name is always complete.

Every durable operation goes through `_write`, `_write_at`, `_flush`, `_rename` or `_remove`, so that tests can make
any single one fail. No other module makes files durable.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from llm.base.errors import RecipeError, RefusedError

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # the file system lacks the operation
BLOCK, STAGE = 4096, 16 << 20  # bytes: the unit of O_DIRECT, and the size of one write
DRAFT = ".draft-"  # prefix of unfinished files and folders: ignore them, sweep them away


def _draft_of(path: Path) -> Path:
    return path.with_name(f"{DRAFT}{path.name}-{uuid.uuid4().hex[:8]}")


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        _flush(file.fileno())


def _write_at(path: Path, chunks: Iterable[tuple[int, bytes | memoryview]]) -> None:
    with path.open("r+b", buffering=0) as file, _Stage(path, file.fileno()) as stage:
        for offset, chunk in chunks:
            stage.write(offset, memoryview(chunk))
        stage.empty()
        _flush(file.fileno())


class _Stage:
    """A buffer that collects a file's bytes into large writes.

    Whole blocks bypass the page cache (O_DIRECT) where the file system allows: filling the cache takes more CPU time
    than the rest of a write. Partial blocks, whose remainder another process may write, go through the cache.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.file, self.direct = file, -1
        self.memory = memoryview(mmap.mmap(-1, STAGE))  # O_DIRECT wants it aligned
        self.begin = self.end = 0  # of what is collected, in the file
        if hasattr(os, "O_DIRECT"):
            try:
                self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *_: object) -> None:
        if self.direct >= 0:
            os.close(self.direct)

    def write(self, offset: int, chunk: memoryview) -> None:
        if offset != self.end:
            self.empty()
            self.begin = self.end = offset
        while chunk:
            base = self.begin // BLOCK * BLOCK  # of the memory, in the file
            part = chunk[: base + STAGE - self.end]
            self.memory[self.end - base :][: len(part)] = part
            self.end, chunk = self.end + len(part), chunk[len(part) :]
            if self.end == base + STAGE:
                self.empty()

    def empty(self) -> None:
        """Write the collected bytes."""
        base, first, last = self.begin // BLOCK * BLOCK, -(-self.begin // BLOCK) * BLOCK, self.end // BLOCK * BLOCK
        if self.direct < 0 or first >= last:
            self._put(self.file, self.begin - base, self.end - base, base)
        else:
            self._put(self.file, self.begin - base, first - base, base)
            self._put(self.direct, first - base, last - base, base)
            self._put(self.file, last - base, self.end - base, base)
        self.begin = self.end

    def _put(self, file: int, low: int, high: int, base: int) -> None:
        """Write these bytes of the memory, whose first is byte `base` of the file."""
        while low < high:
            try:
                os.lseek(file, base + low, os.SEEK_SET)
                low += os.write(file, self.memory[low:high])
            except OSError as error:
                if file == self.file or error.errno not in UNSUPPORTED:
                    raise
                file = self.file


def _flush(handle: int) -> None:
    os.fsync(handle)


def _rename(draft: Path, final: Path) -> None:
    draft.replace(final)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` durable, on systems that can flush a folder."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            _flush(handle)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(handle)


def expanded(name: str | Path) -> Path:
    """`name` as a path with `~` expanded. RecipeError if the user has no home folder."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError as error:
        if path.parts[0] == "~":
            raise RecipeError(f"{name}: ~ has no home folder here (HOME is not set): write the full path") from error
        if os.path.exists(path):  # noqa: PTH110  # a file whose name begins with ~; pathlib raises where it is too long
            return path
        user = path.parts[0][1:]
        raise RecipeError(f"{name} is not there, and there is no user {user!r} with a home folder") from error


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RecipeError(f"{folder} is no folder, and a folder is needed there: name another place") from None
        flush_folder(folder.parent)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace the content of `path` by `data`: all of it, or nothing changes."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Replace the content of `path` by the concatenated `chunks`: all of them, or nothing changes."""
    make_folder(path.parent)
    _refuse_other_than_file(path)
    draft = _draft_of(path)
    try:
        with _named(path):
            _write(draft, chunks)
            _rename(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def check_writable(path: Path) -> None:
    """Fail as `write_bytes` would, before the work that makes the bytes; `path` keeps its content."""
    make_folder(path.parent)
    _refuse_other_than_file(path)
    draft = _draft_of(path)
    with _named(path):
        draft.touch()
        draft.unlink()


def _refuse_other_than_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a rename would put a file in the place of a pipe or a device
        raise RecipeError(f"{path} is a folder, a pipe or a device: name a file, or move it away")


def write_at(path: Path, chunks: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Write each chunk at its offset in an existing draft, durably. Other processes may write the rest of the file."""
    with _named(path):
        _write_at(path, chunks)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add `path` to an OSError raised in the block; the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `as_json` gives it, with the promise of `write_bytes`."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """`value` as indented JSON with its keys in the order given. ValueError if a number is not finite."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_checksummed(path: Path, value: dict[str, Any]) -> None:
    """`value` as readable JSON with its own digest in it, for `read_checksummed`."""
    write_json(path, {**value, "digest": digest_of(value)})


def read_checksummed(path: Path, most_bytes: int = 64 << 20) -> dict[str, Any]:
    """The value that `write_checksummed` wrote. RefusedError if `path` is missing or differs in a single bit."""
    if not path.is_file():
        raise RefusedError(f"{path} is missing")
    data = _read_bytes(path, most_bytes)
    value = _parsed(path, data)
    try:
        whole = isinstance(value, dict) and as_json(value) == data  # JSON has several ways to write one number
    except ValueError:  # an infinite number, half of a surrogate pair
        whole = False
    if not whole or value.pop("digest", None) != digest_of(value):
        raise RefusedError(f"{path} is damaged: it does not match its own digest")
    return dict(value)


def read_json(path: Path, most_bytes: int = 64 << 20) -> Any:
    """The value in `path`. RefusedError if it is not JSON, too large to be ours, or nested too deeply."""
    return _parsed(path, _read_bytes(path, most_bytes))


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    if path.stat().st_size > most_bytes:
        raise RefusedError(f"{path} has {path.stat().st_size} bytes, more than any file of ours: it was not read")
    return path.read_bytes()


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is damaged: not JSON ({type(error).__name__})") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@contextmanager
def draft_folder(final: Path) -> Iterator[Path]:
    """A draft folder to fill. After the block it has the name `final`, durably; if the block fails it is removed."""
    make_folder(final.parent)
    draft = _draft_of(final)
    draft.mkdir()
    try:
        yield draft
        settle(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def settle(draft: Path, final: Path) -> None:
    """Rename the filled folder `draft` to `final`, durably, replacing whatever has that name."""
    flush_folder(draft)
    if final.exists():
        remove(final)
    _rename(draft, final)
    flush_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so that it never appears half removed."""
    if path.name.startswith(DRAFT):
        return _remove(path)
    doomed = _draft_of(path)
    _rename(path, doomed)
    _remove(doomed)


def sweep(folder: Path, of: str = "") -> None:
    """Remove the drafts (of the name `of`) that a killed process left in `folder`. The caller must hold their lock."""
    for draft in folder.glob(f"{DRAFT}{of}*"):
        _remove(draft)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`, which the kernel releases if the holder dies. Yields False if another holds it.

    On a file system without locks a second file names the holder, and is ignored if that process is dead.
    """
    make_folder(path.parent)
    file_lock: BaseFileLock = FileLock(path)
    try:
        try:
            file_lock.acquire(timeout=-1 if wait else 0)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in (errno.ENOLCK, *UNSUPPORTED):
                raise
            file_lock = SoftFileLock(path.with_name(f"{path.name}-holder"))
            file_lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()


class Lines:
    """A growing file of JSON lines. Opening it drops a line that a killed process left unfinished.

    `invalid`: lines that were complete but held no JSON object, and were dropped too.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True) -> None:
        """Open `path`, keeping its valid lines for which `keep` is true."""
        make_folder(path.parent)
        self.invalid = 0
        if path.exists():
            kept = []
            with path.open(encoding="utf-8", errors="replace") as file:
                for text in file:
                    if (line := _object(text)) is None:
                        self.invalid += text.endswith("\n")
                    elif keep(line):
                        kept.append(json.dumps(line) + "\n")
            if (data := "".join(kept).encode()) != path.read_bytes():
                write_bytes(path, data)
        self.path, self.file = path, path.open("a", encoding="utf-8", newline="\n")

    def append(self, line: dict[str, Any]) -> None:
        """Add one line, with null for numbers that are not finite: at once for other processes, durably by `flush`."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        with _named(self.path):
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            self.file.flush()

    def flush(self) -> None:
        _flush(self.file.fileno())

    def close(self) -> None:
        with _named(self.path):
            self.file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The valid lines of a file of JSON objects."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for text in file if (line := _object(text)) is not None)


def _object(text: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    return None
