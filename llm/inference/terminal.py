"""Input from a person at a terminal: lines, pastes as one text, and a history of both."""

import os
import select
import sys
from contextlib import suppress

PASTE_SECONDS = 0.05  # input that reaches a terminal sooner than this after the last line belongs to the same text


def set_up() -> None:
    """Give input() arrow keys, a history and marked pastes."""
    with suppress(ImportError):  # Windows has no readline
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


def ask(stay: bool = False) -> str | None:
    """A text from a person, of several lines if it was pasted; None when the person leaves.

    Ctrl-C drops the line; where nothing was typed, it leaves unless told to `stay`.
    """
    try:
        if sys.stdout.isatty():
            line = input("> ")
        else:  # input() would write the prompt sign into the text
            print("> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                raise EOFError
            line = line.removesuffix("\n")
        return f"{line}\n{pending_input()}".replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        readline = sys.modules.get("readline")
        return "" if stay or (readline and readline.get_line_buffer()) else None


def pending_input() -> str:
    """The rest of a paste, on terminals that do not mark one: all input that is there already."""
    try:
        import termios
        import tty
    except ImportError:
        return ""
    terminal, data = sys.stdin.fileno(), b""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSANOW)
    try:
        while select.select([terminal], [], [], PASTE_SECONDS)[0] and (part := os.read(terminal, 1 << 16)):
            data += part
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
    return data.decode(errors="replace")
