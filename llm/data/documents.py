"""Documents: how a text is cut into them, and which of them are held out.

The bytes of a document are never altered: joined, the documents of a plain text give the text back, except for marker
lines, which belong to no document, and documents of nothing but whitespace, which are left out. A document is at most
1 MiB, so that a text of any size and with lines of any length needs little memory.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from llm.base.atomic_io import digest_of
from llm.base.errors import TextError
from llm.config.resolving import check_rule
from llm.config.schema import Text
from llm.data.sources import Source, sources_of

MAX_DOCUMENT = 1 << 20  # bytes; a longer document is cut, as it would have to be held in memory
PAGE = 4096  # bytes of a document under the rule `blocks`
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eos|>", "<eos>", "</s>", "[EOS]")


@dataclass(frozen=True)
class Rule:
    """How to find documents in a text: `separator` stands between two, and none is longer than `most` bytes."""

    name: str
    separator: re.Pattern[bytes] | None = None
    most: int = MAX_DOCUMENT
    drops_separator: bool = False  # else the separator stays with the document before it

    def cut(self, text: bytes, begin: int) -> tuple[int, int, bool]:
        """Where the document at `begin` ends, where the next one begins, and whether only its length ended it."""
        start = begin if self.drops_separator else _after_blanks(text, begin)  # leading blank lines are no document
        found = self.separator.search(text, start) if self.separator else None
        end = (found.start() if self.drops_separator else found.end()) if found else len(text)
        if end - begin > self.most:
            end = _place_to_cut(text, begin, begin + self.most)
            return end, end, True
        return end, found.end() if found else end, False


def _after_blanks(text: bytes, begin: int) -> int:
    found = _NOT_BLANK.search(text, begin)
    return found.start() if found else len(text)


def _place_to_cut(text: bytes, begin: int, limit: int) -> int:
    """The best place up to `limit`: after a blank line, line or word in the second half, else between characters."""
    for separator in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = text.rfind(separator, begin + (limit - begin) // 2, limit)
        if found >= 0:
            return found + len(separator)
    while text[limit] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        limit -= 1
    return limit


# Each separator begins with bytes that the regular expression engine finds fast (it would try `^` at every byte). Each
# match is shorter than MARGIN or longer than any document, so that MARGIN bytes more than a document decide every cut.
MARGIN = 1 << 16
_NOT_BLANK = re.compile(rb"\S")
_HEADING = re.compile(rb"\n(?= = (?!=)[^\n]{1,500} = \r?\n)")  # WikiText: ` = Title = `, but not ` = = Section = = `


def _blank_lines(least: int) -> re.Pattern[bytes]:
    return re.compile(rb"\n(?:[ \t]{0,500}\r?\n){%d,}" % least)


def _marker(line: str) -> Rule:
    mark = re.escape(line.encode())
    return Rule(f"marker {line}", re.compile(mark + rb"(?<=\n" + mark + rb")\r?(?:\n|\Z)"), drops_separator=True)


def rule_for(name: str, head: bytes, rest: Iterable[bytes] = ()) -> Rule:
    """The rule that a recipe's `text.documents` names, for a file that begins with `head` and continues with `rest`.

    `headings`: a WikiText heading of level one begins a document. `blank-lines`: two or more blank lines end one, or
    one where the head has no two in a row. `lines`: each line is one. `blocks`: whole paragraphs (else lines, else
    words) gathered to at most 4 KiB. `files`: each file is one. `marker LINE`: lines that equal LINE separate
    documents. `auto` takes known markers, searched in the whole file; otherwise headings or runs of two blank lines,
    whichever first give documents of at most 64 KiB on average; otherwise `blocks`.
    """
    if name == "auto":
        return _guess(b"\n" + head, rest)
    if name == "headings":
        return Rule(name, _HEADING)
    if name == "blank-lines":
        has_two = _blank_lines(2).search(b"\n" + head) is not None
        return Rule(f"{name} ({'two' if has_two else 'one'} or more)", _blank_lines(2 if has_two else 1))
    if name == "lines":
        return Rule(name, _blank_lines(0))
    if name == "blocks":
        return Rule(name, most=PAGE)
    if name == "files":
        return Rule(name)
    check_rule("text.documents", name)
    return _marker(name.removeprefix("marker "))


def _guess(head: bytes, rest: Iterable[bytes]) -> Rule:
    """The rule `auto`."""
    if marker := _known_marker(head, rest):
        return _marker(marker)
    for name, pattern in (("headings", _HEADING), ("blank-lines", _blank_lines(2))):
        if _count(pattern, head) * (64 << 10) >= len(head):
            return rule_for(name, head)
    return rule_for("blocks", head)


_KNOWN = re.compile(rb"\n(%s)(?=\r?\n)" % b"|".join(re.escape(marker.encode()) for marker in MARKERS))
LONGEST_MARKER = max(map(len, MARKERS)) + 2  # with its line end


def _known_marker(head: bytes, rest: Iterable[bytes]) -> str | None:
    """The first of MARKERS that separates documents in the whole file and is no accident, such as a stray HTML tag.

    Documents between markers are at most 1 MiB on average and not full of headings. A single marker counts if it
    begins or ends the file, or if the file has only a few paragraphs.
    """
    found: Counter[bytes] = Counter()
    text, end, size = b"", b"", 0
    for chunk in chain((head,), rest, (b"\n",)):
        size, end = size + len(chunk), (end + chunk)[-2 * LONGEST_MARKER :]
        text += chunk
        lines = text.rfind(b"\n") + 1
        found.update(_KNOWN.findall(text, 0, lines))
        text = text[max(0, lines - 1) :][: LONGEST_MARKER + 1]  # the start of an unfinished line is enough
    headings, paragraphs = _count(_HEADING, head) * size / len(head), _count(_blank_lines(1), head)
    for name in MARKERS:
        marker = name.encode()
        count, others = found[marker], found.total() - found[marker]
        is_at_an_end = head.lstrip().startswith(marker) or end.rstrip().endswith(marker)
        is_accident = count == 1 and not is_at_an_end and paragraphs + others > 20
        if count and count * MAX_DOCUMENT >= size and count * 10 >= headings and not is_accident:
            return name
    return None


def _count(pattern: re.Pattern[bytes], text: bytes) -> int:
    return sum(1 for _ in pattern.finditer(text))


class Place:
    """How far the documents of a corpus were read: the number of the source, and the bytes of its text before the next.

    `offset` is -1 within a source of rows, where reading cannot begin.
    """

    def __init__(self, source: int = 0, offset: int = 0) -> None:
        self.source, self.offset = source, offset
        self._held: list[bytes] = []  # text of this source from `_begin` on
        self._begin = offset

    def watched(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks, of which `digest` gets a copy; the byte before `offset`, if there is one, is not copied."""
        self._held, self._begin = [], self.offset

        def kept(before: int) -> Iterator[bytes]:
            for chunk in chunks:
                self._held.append(chunk[before:])
                before = 0
                yield chunk

        return kept(int(self.offset > 0))

    def digest(self) -> str:
        """SHA-256 of the text of this source up to here, since the last call or the beginning."""
        text = b"".join(self._held)
        size = self.offset - self._begin
        self._held, self._begin = [text[size:]], self.offset
        return hashlib.sha256(text[:size]).hexdigest()


def cut_documents(
    chunks: Iterable[bytes], rule: Rule, notes: Counter[str], place: Place | None = None
) -> Iterator[bytes]:
    """The documents of a text that comes in `chunks`; they do not depend on where the chunks end.

    `place` says where the chunks begin, and is moved past each document.
    """
    source, place = iter(chunks), place or Place()
    text, begin, more = b"\n", 1, True  # the byte before `begin` is kept: it tells whether a line begins there
    base = place.offset - 1  # where `text` begins
    if place.offset:
        text = next(source, b"")
        source, text = chain([text[1:]], source), text[:1]
    while True:
        while more and len(text) - begin < 2 * rule.most + MARGIN:
            chunk = next(source, None)
            more = chunk is not None
            base += begin - 1
            text, begin = text[begin - 1 :] + (chunk or b""), 1
        if begin == len(text):
            return
        end, following, is_too_long = rule.cut(text, begin)
        document, begin = text[begin:end], following
        place.offset = base + begin
        if is_too_long and rule.most == MAX_DOCUMENT:
            notes["documents cut at 1 MiB"] += 1
        if not b"!" <= document[:1] <= b"~" and document.decode().isspace():
            notes["documents of only whitespace left out"] += 1
        elif document:
            yield document


def fraction(document: bytes) -> float:
    """A number in [0, 1) from a hash of the document, which is held out if the number is below text.validation."""
    return key_of(document) / 2**64


def key_of(document: bytes) -> int:
    """64 bits of a hash of the document, by which it is split and known again."""
    return int.from_bytes(hashlib.blake2b(document).digest()[:8], "big")


_ROW, _CONVERSATION = Rule("one document a row"), Rule("one conversation a row")


def _rule_of(source: Source, name: str, known: str | None = None) -> Rule:
    """How to find documents in this source, whatever the others hold; of a text that grew, by the rule `known`."""
    if source.is_chat:
        return _CONVERSATION
    if not source.is_plain:
        return _ROW
    chunks = iter(next(source.texts(Counter())))
    if known in ("headings", "blocks") or (known and known.startswith(("marker ", "blank-lines"))):
        name = known if known.startswith("marker ") else known.partition(" ")[0]
    return rule_for(name, next(chunks, b""), chunks)


class Corpus:
    """The documents that a recipe's `text` section names, or those of a caller's `own` source, of `most` bytes at most.

    Files are taken as they are now: one that changes later is refused when read. TextError or RecipeError, at once,
    for names that lead nowhere.
    """

    def __init__(
        self, text: Text, most: int = MAX_DOCUMENT, own: Source | None = None, rules: dict[str, str] | None = None
    ) -> None:
        named: dict[Any, Source] = {}
        self.repeated: list[str] = []  # one line for each source that is named more than once, under any name
        self.left_out: list[tuple[str, str]] = []  # each file of a folder that is no text, and why
        for source in [own] if own else sources_of(text, self.left_out):
            first = named.setdefault(source.key, source)
            if first is not source:
                other = "twice" if first.name == source.name else f"as {first.name} too"
                self.repeated.append(f"{source.name} is named {other}: it is read once")
        self.sources = list(named.values())
        check_rule("text.documents", text.documents)  # the rules themselves are found when needed
        self._rule_name, self.most = text.documents, most
        self.known_rules = rules or {}  # by source: the rules of a text that was read before stay
        # Differs whenever the documents could. The first number counts changes to the way documents are found.
        self.identity = [2, text.documents, text.field, most, [source.identity for source in self.sources]]

    @property
    def seen(self) -> dict[str, Any]:
        """A record of the files, by which a run knows later whether they are unchanged."""
        return {"identity": digest_of(self.identity), "most": self.most}

    @cached_property
    def is_chat(self) -> bool:
        """True if its documents are conversations. TextError if it names texts too."""
        chats = [source.is_chat for source in self.sources]
        if any(chats) and not all(chats):
            chat, text = (self.sources[chats.index(kind)].name for kind in (True, False))
            raise TextError(
                f"{chat} holds conversations and {text} a text: give each a place of its own in text.sources"
            )
        return any(chats)

    @cached_property
    def _rules(self) -> list[Rule]:
        rules = [_rule_of(source, self._rule_name, self.known_rules.get(source.name)) for source in self.sources]
        if self.is_chat:  # which are never cut
            return rules
        return [replace(rule, most=min(rule.most, self.most)) for rule in rules]

    @property
    def rule(self) -> str:
        """How documents are found, for people."""
        names = Counter(rule.name for rule in self._rules)
        of = (f" ({files:,} file{'s' * (files > 1)})" if len(names) > 1 else "" for files in names.values())
        cut = f", cut at {self.most:,} bytes" if self.most < MAX_DOCUMENT else ""
        return ", ".join(map("".join, zip(names, of, strict=True))) + cut

    @property
    def rules(self) -> dict[str, str]:
        """The names of the rules that `auto` found, by source."""
        if self._rule_name != "auto":
            return {}
        return {source.name: rule.name for source, rule in zip(self.sources, self._rules, strict=True)}

    def bytes_expected(self) -> int | None:
        """The size of the text, where it is known without reading."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def documents(
        self, notes: Counter[str] | None = None, place: Place | None = None, watch: bool = False
    ) -> Iterator[bytes]:
        """Every document in order, its bytes exactly as in the text; `notes` counts cuts and omissions.

        They begin at `place`, which is moved past each document; with `watch` it can digest the text that was read.
        """
        counted: Counter[str] = Counter() if notes is None else notes
        here = place or Place()
        for number, (source, rule) in enumerate(zip(self.sources, self._rules, strict=True)):
            if number >= here.source:
                if number > here.source:
                    here.source, here.offset = number, 0
                yield from self._documents_of(source, rule, counted, here, watch)

    def _documents_of(
        self, source: Source, rule: Rule, notes: Counter[str], place: Place, watch: bool = False
    ) -> Iterator[bytes]:
        if source.is_plain:
            text = source.text_from(notes, max(0, place.offset - 1))
            yield from cut_documents(place.watched(text) if watch else text, rule, notes, place)
            return
        for chunks in source.texts(notes):
            for document in [b"".join(chunks)] if source.is_chat else cut_documents(chunks, rule, notes):
                place.offset = -1
                yield document

    def report(self) -> Iterator[tuple[str, int, int, str]]:
        """Name, documents and bytes of each source, and what was left out of it or why it is refused."""
        for source in self.sources:
            notes: Counter[str] = Counter()
            documents = size = 0
            try:
                rule = _rule_of(source, self._rule_name)
                for document in self._documents_of(
                    source, replace(rule, most=min(rule.most, self.most)), notes, Place()
                ):
                    documents, size = documents + 1, size + len(document)
            except TextError as error:
                yield source.name, documents, size, f"refused: {error}"
            else:
                yield source.name, documents, size, "; ".join(f"{what}: {count:,}" for what, count in notes.items())
        yield from ((name, 0, 0, f"left out: it {reason}") for name, reason in self.left_out)
