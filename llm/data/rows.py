"""The rows of a file: JSON lines, a JSON array, a table of comma- or tab-separated values, or Parquet.

Each reader yields (place, row): where the row stands, for messages, and the row, usually a dict. All stream: a row is
held in memory, a file is not.
"""

import codecs
import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

from llm.base.errors import TextError
from llm.data import text_files
from llm.data.conversations import FORMS

LONGEST_ROW = 64 << 20  # bytes of a row, which is read whole
LONGEST_LITERAL = 16  # characters that any escape or literal of JSON fits in, such as \ud83c\udf89 or -Infinity
BATCH = 64  # rows of a Parquet file that are decoded at once
DELIMITERS = ",;\t"
_SPACE = re.compile(r"[ \t\r\n]*")

Rows: TypeAlias = Iterator[tuple[str, Any]]


class NoTextField(TextError):
    """A table or an array without the field that holds the text."""


def rows_of(path: Path, identity: Any, field: str, notes: Counter[str]) -> Rows:
    """The rows of a file by the suffix of its name. TextError names the file, and the row, that is at fault."""
    suffix = text_files.suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path, identity, field, notes)
    chunks = text_files.read_chunks(path, identity, notes)
    if suffix == ".json":
        return _array(path, chunks)
    if suffix in (".csv", ".tsv"):
        return _table(path, chunks, field, "\t" if suffix == ".tsv" else DELIMITERS)
    return _json_lines(path, chunks)


def _json_lines(path: Path, chunks: Iterable[bytes]) -> Rows:
    for number, line in enumerate(_lines(path, chunks), 1):
        if line and not line.isspace():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{path} line {number} is not JSON ({error}): each line must be an object") from error


def _lines(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file with their line ends."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > LONGEST_ROW:
            raise TextError(f"{path} has a line of more than {LONGEST_ROW >> 20} MiB: make its documents shorter")
    if rest:
        yield rest


def _array(path: Path, chunks: Iterable[bytes]) -> Rows:
    """The elements of a JSON array, decoded one at a time from a buffer."""
    decode, text = json.JSONDecoder().raw_decode, _Buffer(path, chunks)
    if text.next_sign() != "[":
        mend = "write its documents as [{...}, {...}], or as .jsonl if each line is an object"
        raise NoTextField(f"{path} is not a JSON array: {mend}")
    text.at += 1
    number = 0
    while (sign := text.next_sign()) != "]":
        if number:
            if sign != ",":
                raise TextError(f"{path} row {number + 1} is not JSON (',' expected): save the file again as JSON")
            text.at += 1
            text.next_sign()
        number += 1
        while True:
            try:
                row, end = decode(text.text, text.at)
                if end < len(text.text) or not text.more():  # else a number may go on
                    break
            except (ValueError, RecursionError) as error:
                # An incomplete row fails near its end, in an escape or a literal, or where its last string begins.
                at, said = getattr(error, "pos", 0), str(error)
                damaged = at < len(text.text) - LONGEST_LITERAL and not said.startswith("Unterminated string")
                if damaged or isinstance(error, RecursionError) or not text.more():
                    raise TextError(f"{path} row {number} is not JSON ({error}): save the file again") from error
        yield f"{path} row {number}", row
        text.at = end
    text.at += 1
    if text.next_sign():
        raise TextError(f"{path} goes on after its array: keep one array in a .json file")


class _Buffer:
    """The characters of a file from `at` on, as many as were asked for."""

    def __init__(self, path: Path, chunks: Iterable[bytes]) -> None:
        self._path, self._chunks = path, iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0

    def more(self) -> bool:
        """Read on, at least as much as is there, so that a long row is decoded few times; False at the end."""
        parts = [self.text[self.at :]]
        wanted = size = len(parts[0])
        while size <= 2 * wanted and (chunk := next(self._chunks, None)) is not None:
            parts.append(self._decoder.decode(chunk))
            size += len(parts[-1])
        if wanted > LONGEST_ROW:
            raise TextError(f"{self._path} has a row of more than {LONGEST_ROW >> 20} MiB: make its documents shorter")
        self.text, self.at = "".join(parts), 0
        return size > wanted

    def next_sign(self) -> str:
        """The next character that is no space, which is then at `at`; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def _table(path: Path, chunks: Iterable[bytes], field: str, delimiters: str) -> Rows:
    """The rows of a table whose first row names the columns; of several delimiters the one that gives `field`."""
    csv.field_size_limit(max(LONGEST_ROW, csv.field_size_limit()))  # 128 KiB otherwise, for the whole process
    lines = (line.decode() for line in _lines(path, chunks))
    head = next(lines, "")
    delimiter = next((each for each in delimiters if field in _columns(head, each)), None)
    if delimiter is None:
        shown = head.strip()[:80]
        fault = f"has no column text.field = {field!r} in its first row ({shown})"
        raise NoTextField(f"{path} {fault}: name another by text.field")
    reader = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
    try:
        columns = next(reader)
        _refuse_twice(path, columns, field)
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if row and len(row) != len(columns):
                raise TextError(f"{place} ends a row of {len(row)} columns, the first row has {len(columns)}: mend it")
            if row:
                yield place, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise TextError(f"{path} line {reader.line_num} is damaged ({error}): save the table again") from error


def _columns(head: str, delimiter: str) -> list[str]:
    """The columns that the first row of a table names; none where it is damaged."""
    try:
        return next(csv.reader([head], delimiter=delimiter), [])
    except csv.Error:
        return []


def _refuse_twice(path: Path, columns: list[str], name: str) -> None:
    if columns.count(name) > 1:
        raise TextError(f"{path} has {columns.count(name)} columns {name}: rename all but one of them")


def _parquet(path: Path, identity: Any, field: str, notes: Counter[str]) -> Rows:
    """The column `field`, or that of conversations; rows where it is null are left out."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _whole(path, identity) as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = [name for name in (field, *FORMS) if name in table.schema_arrow.names][:1]
            if not names:
                columns = ", ".join(map(str, table.schema_arrow.names)) or "no other either"
                raise NoTextField(
                    f"{path} has no column text.field = {field!r} ({columns}): name another by text.field"
                )
            _refuse_twice(path, table.schema_arrow.names, names[0])
            kind = table.schema_arrow.field(names[0]).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if names[0] == field and str(values) not in ("string", "large_string", "string_view"):
                raise TextError(f"{path} has {kind} in its column {field}, not text: name another by text.field")
            for batch in table.iter_batches(BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    if row[names[0]] is None:
                        notes["rows without a text left out"] += 1
                    else:
                        yield f"{path} row {number}", row
                if text_files.identity(path, path.stat()) != identity:
                    raise TextError(f"{path} changed while it was read: run the same command again")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 after row {number}: write the table again") from error
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = str(error).splitlines()[0][:120]
        raise TextError(f"{path} is damaged or no Parquet file ({why}): write it again") from error
    except (OverflowError, ValueError) as error:  # such as a date beyond Python's
        raise TextError(f"{path} has no readable row after row {number} ({error}): write the table again") from error


def _whole(path: Path, identity: Any) -> IO[bytes]:
    """The file, unpacked into a temporary one if it is packed, as Parquet is read from its end."""
    if text_files.packed_as(path) is None:
        return path.open("rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    for chunk in text_files.unpacked(path, identity):
        file.write(chunk)
    file.seek(0)
    return file
