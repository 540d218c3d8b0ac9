"""Read a text file as checked UTF-8 chunks, and say how to convert a file that is not UTF-8.

Files are read in chunks so that a text of any size, with lines of any length, needs little memory.
"""

import codecs
import gzip
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.base.errors import TextError

CHUNK = 1 << 20  # bytes read at once; the rule `auto` looks for headings and blank lines in the first chunk
ROWS = (".jsonl", ".ndjson")  # one JSON object per line; files with any other suffix are plain text
COMPRESSED = "is compressed in a format that is not supported: unpack it first, or compress it with gzip"
TABLE = "is a table, not text: write its rows as .jsonl, one object per line with the text in the field `text`"
DOCUMENT = "is no plain text: save its text as UTF-8 in a .txt file"
UNSUPPORTED = {
    ".json": "is one JSON value, not text: write its documents as .jsonl, one object per line (or rename it if it is)",
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".xls", ".xlsx", ".ods"), TABLE),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br", ".rar"), COMPRESSED),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi"), DOCUMENT),
}
GZIP = b"\x1f\x8b"
MAGIC = {  # first bytes of these formats under any file name
    b"\xfd7zXZ\0": COMPRESSED, b"\x28\xb5\x2f\xfd": COMPRESSED, b"BZh": COMPRESSED, b"PK\x03\x04": COMPRESSED,
    b"7z\xbc\xaf": COMPRESSED, b"PAR1": TABLE, b"%PDF-": DOCUMENT, b"\xd0\xcf\x11\xe0": DOCUMENT}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The file's suffix in lower case; that of the compressed file where the name ends in .gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def holds_rows(path: Path) -> bool:
    """True if the file's name says that each line is a JSON object."""
    return suffix_of(path) in ROWS


def is_gzip(path: Path) -> bool:
    """True if the name ends in .gz or the file begins with the bytes of gzip, which no UTF-8 text does."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".gz" or file.read(2) == GZIP
    except PermissionError as error:
        raise TextError(f"{path} may not be read: give yourself the right to") from error


def identity(path: Path, stat: os.stat_result) -> list[Any]:
    """A JSON value that changes whenever the file does: a program can reset mtime, but not ctime."""
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_chunks(path: Path, expected: Any, notes: Counter[str]) -> Iterator[bytes]:
    """The file's bytes, decompressed and checked: UTF-8 without NUL. A byte order mark is left out.

    TextError if the file is damaged, is not text, or no longer has the `expected` identity.
    """
    check = _Utf8Check(path)
    try:
        with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as file:
            while True:
                chunk = file.read(CHUNK)
                if identity(path, os.fstat(file.fileno())) != expected:
                    raise TextError(f"{path} changed while it was read: run the same command again")
                is_first = check.offset == 0
                check.feed(chunk)
                if not chunk:
                    return
                if is_first and chunk.startswith(codecs.BOM_UTF8):
                    notes["byte order marks left out"] += 1
                    chunk = chunk[len(codecs.BOM_UTF8) :]
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"{path} is damaged ({error}): compress it again with gzip") from error


class _Utf8Check:
    """Checks a file's chunks, in order, for invalid UTF-8 and NUL; an empty chunk ends the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._has_utf8 = False  # earlier chunks hold valid UTF-8 beyond ASCII
        self._last = b""

    def feed(self, chunk: bytes) -> None:
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the last chunk began
        self._last = chunk or self._last  # a fault found at the end of the file lies in its last chunk
        try:
            self._has_utf8 |= not self._decoder.decode(chunk, final=not chunk).isascii()
        except UnicodeDecodeError as error:
            at, byte = self.offset - pending + error.start, error.object[error.start]
            raise TextError(f"{self.path} is not UTF-8 at byte {at} (0x{byte:02x}): {self._mend()}") from error
        if (at := chunk.find(b"\0")) >= 0:
            raise TextError(f"{self.path} has a NUL at byte {self.offset + at}: {self._mend()}")
        self.offset += len(chunk)

    def _mend(self) -> str:
        return conversion(self.path, self._last, first=self.offset == 0, has_utf8=self._has_utf8)


def conversion(path: Path, chunk: bytes, *, first: bool, has_utf8: bool) -> str:
    """How to convert a file with this faulty chunk to UTF-8, as far as the bytes tell its encoding.

    `first`: the chunk begins the file; `has_utf8`: earlier chunks hold valid UTF-8 beyond ASCII.
    """
    if first and (known := [said for magic, said in MAGIC.items() if chunk.startswith(magic)]):
        return f"it {known[0]}"
    found, command = _diagnosis(path, chunk, first=first, has_utf8=has_utf8)
    name, new = shlex.quote(path.name), shlex.quote(f"utf-8-{path.name.removesuffix('.gz')}")
    line = f"gzip -dc {name} | {command} > {new}" if is_gzip(path) else f"{command} < {name} > {new}"
    return f"{found}: `{line}`"


def _diagnosis(path: Path, chunk: bytes, *, first: bool, has_utf8: bool) -> tuple[str, str]:
    """What is wrong with the chunk, and a shell command that converts its file from stdin to stdout."""
    if first and chunk.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "it is UTF-32", "iconv -f utf-32 -t utf-8"
    if first and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16", "iconv -f utf-16 -t utf-8"
    even, odd = chunk[::2].count(0), chunk[1::2].count(0)
    if max(even, odd) * 8 >= len(chunk) > 8 and min(even, odd) * 10 <= max(even, odd):  # Latin letters in UTF-16
        return "it looks like UTF-16", f"iconv -f utf-16{'be' if even > odd else 'le'} -t utf-8"
    if even + odd:
        return "it is no plain text, or its NULs must be left out", "tr -d '\\000'"
    valid = sum(1 for each in chunk.decode(errors="ignore") if each > "\x7f")
    invalid = chunk.decode(errors="replace").count("\ufffd")
    if has_utf8 or valid > invalid:  # in another encoding hardly any two bytes form a UTF-8 character
        return "it is damaged UTF-8; leave the damaged bytes out", "iconv -c -f utf-8 -t utf-8"
    if _looks_western(chunk):
        return "it looks like cp1252 (Western Windows)", "iconv -f cp1252 -t utf-8"
    return f"find out its ENCODING, for instance by `file -i {shlex.quote(path.name)}`", "iconv -f ENCODING -t utf-8"


def _looks_western(chunk: bytes) -> bool:
    """True if the chunk reads as cp1252 with mostly unaccented letters."""
    try:
        letters = re.findall(r"[^\W\d_]", chunk.decode("cp1252"))
    except UnicodeDecodeError:
        return False
    return len(letters) > 2 * sum(byte > 0x7F for byte in chunk)
