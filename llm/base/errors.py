"""What a user can cause, each with its exit status. A message names who, value, rule and mend, in one line.

Raised where the fact is known, caught once, in `run`: one line on stderr, no traceback. What we got wrong ourselves
stays an assertion and keeps its traceback.
"""

import errno
import os
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO


class LLMError(Exception):
    """One line for the user, whatever a name or a value in it holds; `status` is what the process exits with."""

    status = 1

    def __str__(self) -> str:
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in super().__str__())


class RecipeError(LLMError):
    """The recipe, or a command's argument, cannot be meant."""

    status = 2


class TextError(LLMError):
    """The text cannot be read, or is too little."""

    status = 2


class DivergedError(LLMError):
    """A loss or a gradient that is not finite ended the run."""

    status = 3


class RefusedError(LLMError):
    """A checkpoint, a tokenizer or shards are damaged, or do not belong to this run."""

    status = 4


class DiskError(LLMError):
    """The disk is full or fails."""

    status = 5


class GroupError(LLMError):
    """A process failed, also for want of memory, or the group is not what was asked for."""

    status = 6


class StoppedError(LLMError):
    """Asked to stop: everything is saved, the same command goes on."""

    status = 75


def as_disk_error(error: OSError) -> LLMError | None:
    """The DiskError that this failure of the system is, None where neither disk nor permissions are to blame."""
    mends = {
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and run the same command again"),
        **dict.fromkeys((errno.EIO, errno.EROFS), "mend it or name another place, and run the same command again"),
        **dict.fromkeys((errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.ESTALE), "name a place on another disk"),
        **dict.fromkeys((errno.EACCES, errno.EPERM), "allow writing there, or run it in a folder of your own"),
    }
    if error.errno not in mends:
        return None
    where, found = f" at {error.filename}" if error.filename else "", ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename:
        there = next((folder for folder in Path(error.filename).absolute().parents if folder.exists()), None)
        found = f", {shutil.disk_usage(there).free / 1e6:,.1f} MB are free" if there else ""
    return DiskError(f"the disk failed{where}: {os.strerror(error.errno)}{found}; {mends[error.errno]}")


def reason(error: BaseException) -> str:
    """One line that says what an error is, of whatever kind."""
    name = type(error).__name__
    said = str(error) if isinstance(error, LLMError) else " ".join(f"{name}: {error}".split())[:300].removesuffix(":")
    return said or name


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns, or with one line and the status of the LLMError that it raised."""
    grouped = os.environ.get("WORLD_SIZE", "1") != "1"
    _open_console()
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where it may fail, rather than at the interpreter's end
    except LLMError as error:
        if str(error):
            who = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
            kind = "" if isinstance(error, StoppedError) else "error: "
            tell(f"{who}{kind}{error}", sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        tell("interrupted", sys.stderr)
        status = 130
    except OSError as error:
        disk = as_disk_error(error)
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # as in `... | head`
            _silence(sys.stdout)
            status = 0
        elif disk is None:
            raise
        else:
            tell(f"error: {disk}", sys.stderr)
            status = disk.status
    except Exception:
        if not grouped:
            raise
        tell(traceback.format_exc(), sys.stderr)
        status = 1
    for name in ("SIGTERM", "SIGUSR1"):  # the end is decided: one that comes late must not change its status
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if grouped:
        # The threads of the exchange may call into an interpreter that is shutting down, which aborts the process, or
        # wait for a peer that hangs. All that must last is on the disk by now.
        for output in (sys.stdout, sys.stderr):
            with suppress(OSError):
                output.flush()
        os._exit(status)
    sys.exit(status)


def tell(text: str, output: TextIO) -> None:
    """Print a line; no run ends for want of a reader, of a letter or of room."""
    try:
        known = getattr(output, "encoding", None) or "utf-8"
        print(text.encode(known, "backslashreplace").decode(known), file=output, flush=True)
    except OSError:
        _silence(output)


def _silence(output: TextIO) -> None:
    """Let what is printed there from here on go nowhere, so that it fails no more."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


def _has_no_reader(output: TextIO) -> bool:
    poll = select.poll()  # a system without it (Windows) has another error for a pipe that is broken
    poll.register(output.fileno(), 0)
    return bool(poll.poll(0))


def _open_console() -> None:
    """Every letter can be printed, and where stdout or stderr were closed there is one that goes nowhere."""
    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        if output is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")
