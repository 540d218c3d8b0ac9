"""The files of a folder that is a text: all that are text, in the order of their names, hidden ones left out."""

import re
from collections.abc import Iterator
from pathlib import Path

from llm.base.errors import TextError
from llm.data import text_files

HEAD = 8192  # bytes that tell whether a file of an unknown suffix is text
_ENTRY = re.compile(r"([a-z]+-)?[0-9a-f]{64}(\.json|\.lock)?")  # of a cache: a digest
PLAIN = (".txt", ".md", ".markdown", ".rst", ".text", ".tex", ".org", ".log")


def files_of(folder: Path, left_out: list[tuple[str, str]]) -> list[Path]:
    """The text files in `folder` and in the folders below it. `left_out` gets the others, and why.

    Runs and the cache of prepared texts are left out like hidden files, so that a project's folder can be a text.
    TextError for a loop of links, a folder that may not be read, and a name that is not UTF-8.
    """
    found = []
    for path in _walk(folder):
        if reason := _no_text(path):
            left_out.append((str(path), reason))
        else:
            found.append(path)
    return found


def _walk(top: Path) -> Iterator[Path]:
    waiting: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(top, ())]  # each with the folders that it lies in
    while waiting:
        path, above = waiting.pop()
        if _in_cache(path):
            continue
        try:
            if not path.is_dir():
                yield path
                continue
            stat, names = path.stat(), sorted((each.name for each in path.iterdir()), reverse=True)
        except OSError as error:
            mend = "give yourself the right to, or move it"
            raise TextError(f"{str(path)[:400]} cannot be read ({error.strerror}): {mend}") from error
        if (here := (stat.st_dev, stat.st_ino)) in above:
            link = next((each for each in (path, *path.parents) if each.is_symlink()), path)
            raise TextError(f"{link} is a link to a folder that it lies in: remove the link, or name the files")
        if above and {"lock", "status.json"} <= set(names):  # a run
            continue
        for below in (path / name for name in names if not name.startswith(".")):
            refuse_name(below)
            waiting.append((below, (*above, here)))


def _in_cache(path: Path) -> bool:
    """True for an entry of the cache of prepared texts."""
    around = path.parent.parent
    return bool(_ENTRY.fullmatch(path.name)) and all((around / name).is_dir() for name in ("locks", "surveys"))


def refuse_name(path: Path) -> None:
    """TextError where the name of a file is not UTF-8: it could not be recorded."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise TextError(f"{path} has a name that is not UTF-8: rename it") from None


def _no_text(path: Path) -> str | None:
    """Why this file is no text; None if it is, even if a damaged one, which is refused when it is read."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "is a link that leads nowhere"
    except OSError as error:  # such as a link to itself
        raise TextError(f"{path} cannot be reached ({error.strerror}): remove it, or name the other files") from error
    if not path.is_file():
        return "is a pipe or a device"
    if not found.st_size:
        return "is empty"
    suffix = text_files.suffix_of(path)
    if suffix in text_files.UNSUPPORTED:
        return text_files.UNSUPPORTED[suffix].partition(":")[0]
    if suffix in (*text_files.ROWS, *PLAIN):
        return None
    try:
        head = next(text_files.unpacked(path, text_files.identity(path, found)), b"")[:HEAD]
    except TextError:
        return None
    if head.startswith(text_files.UTF16):
        return None
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 and text_files.is_binary(head):
            return "is no text"
    return "is no text" if b"\0" in head else None
