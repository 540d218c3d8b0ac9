"""Errors that a user can cause, each with an exit status. A message is one line: who, value, rule and remedy.

They are raised where the fact is known and caught once, in `run`, which prints the line to stderr without a traceback.
Our own mistakes are assertions and keep their traceback.
"""

import errno
import os
import re
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and newlines


class LLMError(Exception):
    """An error whose message prints as one line, even if a value in it is unprintable. `status` is the exit status."""

    status = 1

    def __init_subclass__(cls, status: int | None = None) -> None:
        cls.status = status or cls.status

    def __str__(self) -> str:
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in super().__str__())


class RecipeError(LLMError, status=2):
    """The recipe or a command-line argument is wrong."""


class TextError(LLMError, status=2):
    """The text cannot be read or is too small."""


class DivergedError(LLMError, status=3):
    """The run ended at a loss or a gradient that is not finite."""


class RefusedError(LLMError, status=4):
    """A checkpoint, tokenizer or shard is damaged or does not belong to this run."""


class DiskError(LLMError, status=5):
    """The disk is full or failed."""


class GroupError(LLMError, status=6):
    """A process failed or ran out of memory, or the process group is not the requested one."""


class StoppedError(LLMError, status=75):
    """The run was asked to stop and saved everything; the same command resumes it."""


def as_disk_error(error: OSError) -> LLMError | None:
    """`error` as a DiskError, or None if neither the disk nor permissions caused it."""
    remedies = {
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and run the same command again"),
        errno.EFBIG: "allow larger files (ulimit -f unlimited) and run the same command again",
        **dict.fromkeys((errno.EIO, errno.EROFS), "repair it or choose another place, and run the same command again"),
        **dict.fromkeys((errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.ESTALE), "choose a place on another disk"),
        **dict.fromkeys((errno.EACCES, errno.EPERM), "make it writable, or run in a folder of your own"),
    }
    if error.errno not in remedies:
        return None
    where, found = f" at {error.filename}" if error.filename else "", ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename:
        there = next((folder for folder in Path(error.filename).absolute().parents if folder.exists()), None)
        found = f", {shutil.disk_usage(there).free / 1e6:,.1f} MB are free" if there else ""
    return DiskError(f"the disk failed{where}: {os.strerror(error.errno)}{found}; {remedies[error.errno]}")


def as_llm_error(error: BaseException) -> LLMError | None:
    """`error` as an LLMError: a RecipeError for a name, a DiskError where the disk failed; None for others."""
    if isinstance(error, LLMError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return RecipeError(f"{str(error.filename)[:80]}: {os.strerror(error.errno)}: choose a shorter one")
    if isinstance(error, OSError) and error.errno in (errno.EISDIR, errno.ENOTDIR) and error.filename:
        return RecipeError(f"{error.filename}: {os.strerror(error.errno)}: move it away, or name another place")
    return as_disk_error(error) if isinstance(error, OSError) else None


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Name `key` in the RecipeError or RefusedError that the block raises."""
    try:
        yield
    except (RecipeError, RefusedError) as error:
        raise type(error)(f"{key}: {error}") from None


def optional(package: str, otherwise: str) -> Any:
    """An optional package. RecipeError says `otherwise` where it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise RecipeError(otherwise) from None


def reason(error: BaseException) -> str:
    """Any exception in one line."""
    name = type(error).__name__
    said = str(error) if isinstance(error, LLMError) else " ".join(f"{name}: {error}".split())[:300].removesuffix(":")
    return said or name


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status that `main` returns, or print the LLMError that it raises and exit with its status."""
    grouped = os.environ.get("WORLD_SIZE", "1") != "1"
    _open_console()
    try:
        status = main() or 0
        sys.stdout.flush()  # fails here, where it is handled, not at interpreter exit
    except KeyboardInterrupt:
        tell("interrupted", sys.stderr)
        status = 130
    except (LLMError, OSError) as error:
        known = as_llm_error(error)
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # as in `... | head`
            _silence(sys.stdout)
            status = 0
        elif known is None:
            raise
        else:
            if str(known):
                who = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
                kind = "" if isinstance(known, StoppedError) else "error: "
                tell(f"{who}{kind}{known}", sys.stderr)
            status = known.status
    except Exception:
        if not grouped:
            raise
        tell(traceback.format_exc(), sys.stderr)
        status = 1
    for name in ("SIGTERM", "SIGUSR1"):  # a late signal must not change the status
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if grouped:
        # Skip the interpreter's shutdown: communication threads would abort in it or wait for a peer that hangs.
        # Everything durable is on disk by now.
        for output in (sys.stdout, sys.stderr):
            with suppress(OSError):
                output.flush()
        os._exit(status)
    sys.exit(status)


def tell(text: str, output: TextIO) -> None:
    """Print a line without failing if the reader is gone, the encoding lacks a character, or the disk is full."""
    try:
        encoding = getattr(output, "encoding", None) or "utf-8"
        print(harmless(text).encode(encoding, "backslashreplace").decode(encoding), file=output, flush=True)
    except OSError:
        _silence(output)


def harmless(text: str) -> str:
    """The text with control characters, as of a sample or a name, written out: a terminal would obey them."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def _silence(output: TextIO) -> None:
    """Redirect the stream to the null device, so that later prints do not fail."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


def _has_no_reader(output: TextIO) -> bool:
    poll = select.poll()  # Windows has no poll, but reports a broken pipe by another error
    poll.register(output.fileno(), 0)
    return bool(poll.poll(0))


def _open_console() -> None:
    """Open a null device in place of a closed stream; stdout and stderr escape characters that they cannot encode."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        if output is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")
