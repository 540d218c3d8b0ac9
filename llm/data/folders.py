"""The files of a folder that is a text: all that are text, in the order of their names, hidden ones left out."""

from collections.abc import Iterator
from pathlib import Path

from llm.base.errors import TextError
from llm.data import text_files

HEAD = 8192  # bytes that tell whether a file of an unknown suffix is text
PLAIN = (".txt", ".md", ".markdown", ".rst", ".text", ".tex", ".org", ".log")


def files_of(folder: Path, left_out: list[tuple[str, str]]) -> list[Path]:
    """The text files in `folder` and in the folders below it. `left_out` gets the others, and why.

    TextError for a loop of links, a folder that may not be read, a name that is not UTF-8, and where no text is found.
    """
    found = []
    for path in _walk(folder, ()):
        if reason := _no_text(path):
            left_out.append((str(path), reason))
        else:
            found.append(path)
    if not found:
        here = f" ({left_out[0][0]} {left_out[0][1]})" if left_out else ""
        raise TextError(f"{folder} is a folder without any text{here}: put your text there")
    return found


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        stat = folder.stat()
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise TextError(
            f"{folder} cannot be read ({error.strerror}): give yourself the right to, or move it"
        ) from error
    if (here := (stat.st_dev, stat.st_ino)) in above:
        raise TextError(f"{folder} is a link to a folder that it lies in: remove the link, or name the files")
    for name in names:
        path = folder / name
        refuse_name(path)
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, here))
        else:
            yield path


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
    if suffix in (*text_files.ROWS, *PLAIN) or text_files.packed_as(path):
        return None
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(text_files.UTF16):
        return None
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 and text_files.is_binary(head):
            return "is no text"
    return "is no text" if b"\0" in head else None
