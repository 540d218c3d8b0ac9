"""The only module that makes files durable: write beside, flush, rename. Whatever bears its final name is whole.

Every durable operation goes through `_write`, `_write_at`, `_flush`, `_rename` and `_remove`, so that a test can let
each single one of them fail.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from llm.base.errors import RecipeError, RefusedError

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # as a file system says it cannot do that
DRAFT = ".draft-"  # what begins with this is unfinished work, to be ignored and swept away


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        _flush(file.fileno())


def _write_at(path: Path, chunks: Iterable[tuple[int, bytes | memoryview]]) -> None:
    with path.open("r+b") as file:
        for offset, chunk in chunks:
            file.seek(offset)
            file.write(chunk)
        file.flush()
        _flush(file.fileno())


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
    """Make the names in `folder` durable, where folders can be opened and flushed (not everywhere)."""
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
    """`name` as a path, with `~` as the user's home. RecipeError where the user has none."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{name}: there is no home here for ~ (HOME is not set): write the whole path") from error


def make_folder(folder: Path) -> None:
    """`folder` is there, and so are the names of whatever had to be made above it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """`path` holds all of `data`, or what it held before."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """`path` holds all `chunks` one after the other, or what it held before."""
    make_folder(path.parent)
    draft = path.with_name(f"{DRAFT}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with _named(path):
            _write(draft, chunks)
            _rename(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_at(path: Path, chunks: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Write each chunk of an existing draft at its offset, durably; other processes may write the rest of the file."""
    with _named(path):
        _write_at(path, chunks)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What fails in the block says at which file: a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, in the order given, under the promise of `write_bytes`."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """`value` as readable JSON, in the order given; ValueError where a number is not finite, which JSON cannot say."""
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
    whole = isinstance(value, dict) and as_json(value) == data  # JSON has several ways to write one number
    if not whole or value.pop("digest", None) != digest_of(value):
        raise RefusedError(f"{path} is damaged: it does not match its own digest")
    return dict(value)


def read_json(path: Path, most_bytes: int = 64 << 20) -> Any:
    """The value in `path`. RefusedError if it is not JSON, too large to be ours, or nested too deeply."""
    return _parsed(path, _read_bytes(path, most_bytes))


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    if path.stat().st_size > most_bytes:
        raise RefusedError(f"{path} has {path.stat().st_size} bytes, more than any of ours: it is not read")
    return path.read_bytes()


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is damaged: not JSON ({type(error).__name__})") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


@contextmanager
def draft_folder(final: Path) -> Iterator[Path]:
    """A folder to fill; at the end of the block it is flushed and bears the name `final`, or nothing of it is left."""
    make_folder(final.parent)
    draft = final.with_name(f"{DRAFT}{final.name}-{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        yield draft
        settle(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def settle(draft: Path, final: Path) -> None:
    """Give the filled folder `draft` its name, durably, in place of what bore it."""
    flush_folder(draft)
    if final.exists():
        remove(final)
    _rename(draft, final)
    flush_folder(final.parent)


def remove(path: Path) -> None:
    """Take `path`, a file or a folder, away; what is removed never looks half there, as it loses its name first."""
    if path.name.startswith(DRAFT):
        return _remove(path)
    doomed = path.with_name(f"{DRAFT}{path.name}-{uuid.uuid4().hex[:8]}")
    _rename(path, doomed)
    _remove(doomed)


def sweep(folder: Path, of: str = "") -> None:
    """Remove the drafts (`of` a name) that a killed process left in `folder`. The caller holds the lock of these."""
    for draft in folder.glob(f"{DRAFT}{of}*"):
        _remove(draft)


def sha256(path: Path) -> str:
    """Digest of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Digest of a JSON value that does not depend on the order of its keys, in hexadecimal."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`, which the kernel frees when its holder dies. Yields False where it is another's.

    Where the file system knows no locks, a file beside it names the holder; one of a dead process does not count.
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
    """A file of JSON lines that grows; a line that a killed process left unfinished is dropped at the next opening."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True) -> None:
        """Keep the whole lines of `path` for which `keep` holds, drop the others."""
        make_folder(path.parent)
        if path.exists():
            text = "".join(json.dumps(line) + "\n" for line in read_lines(path) if keep(line)).encode()
            if text != path.read_bytes():
                write_bytes(path, text)
        self.path, self.file = path, path.open("a", encoding="utf-8", newline="\n")

    def append(self, line: dict[str, Any]) -> None:
        """Add one line. It reaches the operating system at once, and the disk by `flush`."""
        with _named(self.path):
            self.file.write(_line(line))
            self.file.flush()

    def flush(self) -> None:
        _flush(self.file.fileno())

    def close(self) -> None:
        with _named(self.path):
            self.file.close()


def _line(values: dict[str, Any]) -> str:
    """A line of JSON, in which a number that is not finite is null."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(known, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with suppress(ValueError, RecursionError):
                if isinstance(line := json.loads(text), dict):
                    yield line
