"""Read a text file, packed or not, as checked UTF-8 chunks, and say how to convert one that is not UTF-8.

Files are read in chunks so that a text of any size, with lines of any length, needs little memory.
"""

import codecs
import gzip
import lzma
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llm.base.errors import TextError

CHUNK = 1 << 20  # bytes read at once; the rule `auto` looks for headings and blank lines in the first chunk
JSON_LINES = (".jsonl", ".ndjson")  # one JSON object per line
ROWS = (*JSON_LINES, ".json", ".csv", ".tsv", ".parquet")  # files with any other suffix are plain text
COMPRESSED = "is compressed in a format that is not supported: unpack it first, or compress it with gzip, zstd or xz"
TABLE = "is a table in a format that is not supported: write it as .csv, .parquet or .jsonl"
DOCUMENT = "is not plain text: save its text as UTF-8 in a .txt file"
UNSUPPORTED = {
    **dict.fromkeys((".arrow", ".xls", ".xlsx", ".ods"), TABLE),
    **dict.fromkeys((".bz2", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br", ".rar"), COMPRESSED),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi"), DOCUMENT),
}
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0"}  # and how each begins
UTF16, UTF32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc", ".xz": "xz -dc"}
MAGIC = {  # first bytes of these formats under any file name
    b"BZh": COMPRESSED, b"PK\x03\x04": COMPRESSED, b"7z\xbc\xaf": COMPRESSED,
    b"PAR1": "is a Parquet table: give its name the suffix .parquet", b"%PDF-": DOCUMENT,
    b"\xd0\xcf\x11\xe0": DOCUMENT}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The file's suffix in lower case; that of the compressed file where the name ends in .gz, .zst or .xz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def holds_rows(path: Path) -> bool:
    """True if the file's name says that it holds rows: JSON, a table, or one JSON object per line."""
    return suffix_of(path) in ROWS


def packed_as(path: Path) -> str | None:
    """.gz, .zst or .xz if the name ends so or the file begins as such a file does, which no UTF-8 text does."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except PermissionError as error:
        raise TextError(f"{path} may not be read: give yourself the right to") from error
    except FileNotFoundError as error:
        raise TextError(f"{path} was removed while it was read: put it back and run the same command again") from error
    if (suffix := path.suffix.lower()) in PACKED:
        return suffix
    return next((kind for kind, magic in PACKED.items() if head.startswith(magic)), None)


def identity(path: Path, stat: os.stat_result) -> list[Any]:
    """A JSON value that changes whenever the file does: a program can reset mtime, but not ctime."""
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_chunks(path: Path, expected: Any, notes: Counter[str]) -> Iterator[bytes]:
    """The file's text, unpacked and checked: UTF-8 without NUL. A byte order mark is left out, UTF-16 with one is read.

    TextError if the file is damaged, is not text, or no longer has the `expected` identity.
    """
    check: _Utf8Check | _Utf16Reader | None = None
    for chunk in unpacked(path, expected):
        if check is None:
            utf16 = chunk.startswith(UTF16) and not chunk.startswith(UTF32)
            check = _Utf16Reader(path) if utf16 else _Utf8Check(path)
            notes["UTF-16 files read"] += int(utf16)
            notes["byte order marks left out"] += int(chunk.startswith(codecs.BOM_UTF8))
            notes += Counter()  # without zeros
        yield check.feed(chunk)
    if check is not None and (last := check.feed(b"")):
        yield last


def read_from(path: Path, expected: Any, notes: Counter[str], begin: int) -> Iterator[bytes]:
    """As read_chunks, without the first `begin` bytes of the text, which were read before.

    They are read again only of a file that is compressed or in UTF-16.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if not begin or packed_as(path) or (head.startswith(UTF16) and not head.startswith(UTF32)):
        yield from from_byte(read_chunks(path, expected, notes), begin)
        return
    at = begin + len(codecs.BOM_UTF8) * head.startswith(codecs.BOM_UTF8)
    check: _Utf8Check | None = None
    for chunk in unpacked(path, expected, at):
        if check is None:
            check = _Utf8Check(path)
            whole = next((n for n, byte in enumerate(chunk[:4]) if byte & 0xC0 != 0x80), 0)  # where a character begins
            check.offset = at + whole
            yield chunk[:whole] + check.feed(chunk[whole:])
        else:
            yield check.feed(chunk)
    if check is not None:
        check.feed(b"")


def from_byte(chunks: Iterable[bytes], offset: int) -> Iterator[bytes]:
    """The chunks without the first `offset` bytes."""
    for chunk in chunks:
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(0, offset - len(chunk))


def unpacked(path: Path, expected: Any, begin: int = 0) -> Iterator[bytes]:
    """The file's bytes, from byte `begin` of the file on, unpacked if it is compressed.

    TextError if it is damaged or changes while it is read.
    """
    kind = packed_as(path)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            read = _READERS[kind](file)
            while True:
                chunk = read()
                if identity(path, os.fstat(file.fileno())) != expected:
                    raise TextError(f"{path} changed while it was read: run the same command again")
                if not chunk:
                    return
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise TextError(f"{path} is damaged ({error}): compress it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise TextError(f"{path} is damaged ({error}): compress it again") from error  # Arrow's error of zstd


def _gzip(file: IO[bytes]) -> Callable[[], bytes]:
    stream = gzip.GzipFile(fileobj=file)
    return lambda: stream.read(CHUNK)


def _zstd(file: IO[bytes]) -> Callable[[], bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")
    return lambda: bytes(stream.read(CHUNK))


def _xz(file: IO[bytes]) -> Callable[[], bytes]:
    """Unlike lzma.open, which takes a damaged second member for the end of the file."""

    def parts() -> Iterator[bytes]:
        decoder, data = lzma.LZMADecompressor(), file.read(CHUNK)
        while True:
            yield decoder.decompress(data, CHUNK)
            data = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""  # members may be padded
            while not data and (decoder.eof or decoder.needs_input) and (more := file.read(CHUNK)):
                data = more.lstrip(b"\0") if decoder.eof else more
            if decoder.eof and not data:
                return
            if decoder.eof:
                decoder = lzma.LZMADecompressor()
            elif decoder.needs_input and not data:
                raise EOFError("it ends within a member")

    found = parts()

    def read() -> bytes:
        chunk = b""
        while len(chunk) < CHUNK and (part := next(found, None)) is not None:
            chunk += part
        return chunk

    return read


_READERS: dict[str | None, Callable[[IO[bytes]], Callable[[], bytes]]] = {
    None: lambda file: lambda: file.read(CHUNK), ".gz": _gzip, ".zst": _zstd, ".xz": _xz}  # fmt: skip


class _Utf16Reader:
    """Turns a file's chunks, in order, from UTF-16 with a byte order mark into UTF-8; an empty chunk ends the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-16")()

    def feed(self, chunk: bytes) -> bytes:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            command = _command(self.path, "iconv -c -f utf-16 -t utf-8")
            raise TextError(
                f"{self.path} is damaged UTF-16 at byte {self.offset - pending + error.start}; leave the damaged bytes "
                f"out: `{command}`"
            ) from error
        self.offset += len(chunk)
        if "\0" in text:
            command = _command(self.path, "iconv -f utf-16 -t utf-8 | tr -d '\\000'")
            raise TextError(f"{self.path} is UTF-16 and has a NUL: leave its NULs out: `{command}`")
        return text.encode()


class _Utf8Check:
    """Checks a file's chunks, in order, for invalid UTF-8 and NUL; an empty chunk ends the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._has_utf8 = False  # earlier chunks hold valid UTF-8 beyond ASCII
        self._last = b""

    def feed(self, chunk: bytes) -> bytes:
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the last chunk began
        self._last = chunk or self._last  # a fault found at the end of the file lies in its last chunk
        try:
            self._has_utf8 |= not self._decoder.decode(chunk, final=not chunk).isascii()
        except UnicodeDecodeError as error:
            at, byte = self.offset - pending + error.start, error.object[error.start]
            raise TextError(f"{self.path} is not UTF-8 at byte {at} (0x{byte:02x}): {self._mend()}") from error
        if (at := chunk.find(b"\0")) >= 0:
            raise TextError(f"{self.path} has a NUL at byte {self.offset + at}: {self._mend()}")
        is_first = self.offset == 0
        self.offset += len(chunk)
        return chunk.removeprefix(codecs.BOM_UTF8) if is_first else chunk

    def _mend(self) -> str:
        return conversion(self.path, self._last, first=self.offset == 0, has_utf8=self._has_utf8)


def conversion(path: Path, chunk: bytes, *, first: bool, has_utf8: bool) -> str:
    """How to convert a file with this faulty chunk to UTF-8, as far as the bytes tell its encoding.

    `first`: the chunk begins the file; `has_utf8`: earlier chunks hold valid UTF-8 beyond ASCII.
    """
    if first and (known := [said for magic, said in MAGIC.items() if chunk.startswith(magic)]):
        return f"it {known[0]}"
    found, command = _diagnosis(path, chunk, first=first, has_utf8=has_utf8)
    return f"{found}: `{_command(path, command)}`"


def _command(path: Path, convert: str) -> str:
    """The shell command that runs a file through `convert`, from stdin to stdout, into another one beside it."""
    kind = packed_as(path)
    plain = path.name[: -len(kind)] if kind and path.suffix.lower() == kind else path.name
    name, new = shlex.quote(path.name), shlex.quote(f"utf-8-{plain}")
    first, pipe, rest = convert.partition(" | ")
    return f"{UNPACK[kind]} {name} | {convert} > {new}" if kind else f"{first} < {name}{pipe}{rest} > {new}"


def _diagnosis(path: Path, chunk: bytes, *, first: bool, has_utf8: bool) -> tuple[str, str]:
    """The fault of the chunk, and a shell command that converts its file from stdin to stdout."""
    if first and chunk.startswith(UTF32):
        return "it is UTF-32", "iconv -f utf-32 -t utf-8"
    even, odd = chunk[::2].count(0), chunk[1::2].count(0)
    if max(even, odd) * 8 >= len(chunk) > 8 and min(even, odd) * 10 <= max(even, odd):  # Latin letters in UTF-16
        return "it looks like UTF-16", f"iconv -f utf-16{'be' if even > odd else 'le'} -t utf-8"
    if even + odd:
        return "it is not plain text, or its NULs must be left out", "tr -d '\\000'"
    valid = sum(1 for each in chunk.decode(errors="ignore") if each > "\x7f")
    invalid = chunk.decode(errors="replace").count("\ufffd")
    if has_utf8 or valid > invalid:  # in another encoding hardly any two bytes form a UTF-8 character
        return "it is damaged UTF-8; leave the damaged bytes out", "iconv -c -f utf-8 -t utf-8"
    if _looks_western(chunk):
        return "it looks like cp1252 (Western Windows)", "iconv -f cp1252 -t utf-8"
    return f"find out its ENCODING, for instance by `file -i {shlex.quote(path.name)}`", "iconv -f ENCODING -t utf-8"


def is_binary(head: bytes) -> bool:
    """True if the start of a file holds bytes that are in no text of any encoding."""
    return any(byte < 32 and byte not in b"\t\n\r\f\x1b\b\x1a" for byte in head)


def _looks_western(chunk: bytes) -> bool:
    """True if the chunk reads as cp1252 with mostly unaccented letters."""
    try:
        letters = re.findall(r"[^\W\d_]", chunk.decode("cp1252"))
    except UnicodeDecodeError:
        return False
    return len(letters) > 2 * sum(byte > 0x7F for byte in chunk)
