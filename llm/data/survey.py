"""The survey: a text is read once for its digest and sizes, its split, and a sample to train a tokenizer on.

The result is cached under the identity of the text's files, so that they are read again only if they changed.
"""

import hashlib
import heapq
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import TextError
from llm.config.schema import Text
from llm.data.documents import MAX_DOCUMENT, PAGE, Corpus, Place, fraction
from llm.data.progress import Say, Show
from llm.data.sources import Source

SAMPLE = 16 << 20  # bytes of text at most to train a tokenizer on: more changes few pieces and costs memory
MEASURABLE = 1 << 10  # least bytes of the validation side: some 300 tokens, which give its loss to 0.15 nats
LEAST = 256  # least bytes of the validation side of a very small text
SEGMENT = 32 << 20  # bytes of documents that are surveyed together
LEAST_PIECE = 512  # bytes below which no document is cut in order to hold a part of it out


@dataclass(frozen=True)
class Survey:
    """The result of reading a text once: its digest, and the documents and bytes of both sides. Stored as JSON."""

    sha256: str
    rule: str
    share: float  # fraction held out: text.validation, or more where that leaves too little to measure by
    documents: list[int]  # train, validation
    text_bytes: list[int]
    notes: dict[str, int]  # counts of cuts and omissions
    is_chat: bool = False  # its documents are conversations
    segments: list[dict[str, Any]] = field(default_factory=list)  # see Reading
    rules: dict[str, str] = field(default_factory=dict)  # see Corpus.rules

    @property
    def enough(self) -> float:
        """Bytes that the validation side needs: MEASURABLE, or a twentieth of a smaller text, but at least LEAST."""
        return min(MEASURABLE, max(LEAST, sum(self.text_bytes) / 20))

    @property
    def is_split(self) -> bool:
        """True if both sides are usable, or no validation side is asked for."""
        return self.documents[0] > 0 and (not self.share or self.text_bytes[1] >= self.enough)


def survey_path(cache: Path, corpus: Corpus, text: Text) -> Path:
    return cache / "surveys" / f"{atomic_io.digest_of([corpus.identity, text.validation])}.json"


def cut_smaller(survey: Survey) -> int:
    """Bytes at which documents are cut where they are too few or too large to hold some out."""
    return max(LEAST_PIECE, min(PAGE, sum(survey.text_bytes) // 10))


@contextmanager
def cache_lock(path: Path, what: str, say: Say, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a cache entry; a process that has to wait for another says so. A read-only cache needs none.

    Without `wait` it yields False if another process holds the lock.
    """
    lock = path.parent.parent / "locks" / f"{path.parent.name}-{path.stem}.lock"
    if read_only(lock.parent):
        yield True
        return
    with ExitStack() as held:
        mine = held.enter_context(atomic_io.lock(lock))
        if not mine and wait:
            say(f"another process prepares {what}: waiting for it")
            mine = held.enter_context(atomic_io.lock(lock, wait=True))
        if mine:
            atomic_io.sweep(path.parent, of=path.name)
        yield mine


def read_only(path: Path) -> bool:
    """True if `path`, which need not exist yet, cannot be written to."""
    return not os.access(next(each for each in (path, *path.absolute().parents) if each.exists()), os.W_OK)


def surveyed(
    text: Text, cache: Path, show: Show, *, verify: bool, most: int = MAX_DOCUMENT, own: Source | None = None
) -> tuple[Corpus, Survey, list[bytes]]:
    """Corpus and survey of the text, from the cache (with an empty sample) or read, with a sample for the tokenizer.

    If documents of at most `most` bytes are too few or too large to hold some out, they are cut smaller.
    """
    corpus = Corpus(text, most, own)
    path = survey_path(cache, corpus, text)
    sample: list[bytes] = []
    with cache_lock(path, "this text", show.say):
        if path.is_file() and not verify:
            survey = Survey(**atomic_io.read_checksummed(path))
            corpus.known_rules = survey.rules
        else:
            survey, sample = survey_of(corpus, text.validation, show)
            if not read_only(path):
                atomic_io.write_checksummed(path, asdict(survey))
    whole = sum(survey.text_bytes)
    fits = survey.is_split and (survey.share == text.validation or survey.text_bytes[1] * 4 <= whole)
    if not fits and most == MAX_DOCUMENT and not survey.is_chat:
        most = cut_smaller(survey)
        pieces = surveyed(text, cache, show, verify=verify, most=most, own=own)
        if pieces[1].is_split:
            found = f"documents ({sum(survey.documents):,} by the rule {survey.rule})"
            show.say(f"validation: {found} are too few or too large to hold some out: cut at {most:,} bytes")
            return pieces
    return corpus, survey, sample


def survey_of(corpus: Corpus, asked: float, show: Show) -> tuple[Survey, list[bytes]]:
    """Read the text and hold out the fraction `asked`, or the smallest one that leaves enough to measure by.

    Also returns a sample of the training documents: those with the smallest hashes, at most SAMPLE bytes.
    """
    survey, sample, sizes = _read(corpus, asked, show)
    if not asked or survey.text_bytes[1] >= survey.enough:
        return survey, sample
    held = 0
    for place, size in sorted(sizes.items()):
        held += size
        if held >= survey.enough:
            if held <= max(0.5, asked) * sum(survey.text_bytes):  # else the validation side would be the larger one
                return _read(corpus, math.nextafter(place, 1), show)[:2]
            break
    return survey, sample


def _read(corpus: Corpus, val_fraction: float, show: Show) -> tuple[Survey, list[bytes], dict[float, int]]:
    """Survey and sample of the text at this split, and the bytes of text at each of the lowest MEASURABLE fractions."""
    sample: list[tuple[float, int, bytes]] = []
    sampled = 0
    sizes: Counter[float] = Counter()
    least = 1.0  # fractions beyond it are not among the lowest
    reading = Reading(corpus, val_fraction)
    for number, (document, place, side) in enumerate(show.over(reading, "reading", corpus.bytes_expected(), _size)):
        if place < least:
            sizes[place] += len(document)
            if len(sizes) > 2 * MEASURABLE:
                sizes = Counter(dict(sorted(sizes.items())[:MEASURABLE]))
                least = max(sizes)
        if side == 0 and (sampled + len(document) <= SAMPLE or place < -sample[0][0]):
            heapq.heappush(sample, (-place, number, document))
            sampled += len(document)
            while sampled > SAMPLE:
                sampled -= len(heapq.heappop(sample)[2])
    return reading.survey(), [document for _, _, document in sorted(sample, key=lambda each: each[1])], sizes


def _size(read: tuple[bytes, float, int]) -> int:
    return len(read[0])


class Reading:
    """Reads a text, in segments that need not be read again when it grows or a preparation is killed.

    A segment ends at the first place after SEGMENT bytes where reading can begin. The digest of a text is that of its
    documents, or, of a text of several segments, that of their digests.
    """

    def __init__(self, corpus: Corpus, val_fraction: float, known: Sequence[dict[str, Any]] = ()) -> None:
        """`known` are the segments that are as they were."""
        self.corpus, self.val_fraction, self.segments = corpus, val_fraction, list(known)
        self._place = Place(*known[-1]["end"]) if known else Place()
        self._notes = Counter[str]()  # of the segment; the reading of documents counts in it
        self._begin()

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self._documents, self._bytes = [0, 0], [0, 0]
        self._notes.clear()

    def __iter__(self) -> Iterator[tuple[bytes, float, int]]:
        """Each document with its fraction and its side."""
        source = self._place.source
        for document in self.corpus.documents(self._notes, self._place, watch=True):
            if self._place.source != source:
                source = self._place.source
                self._end([source, 0], hashlib.sha256().hexdigest())
            self._digest.update(len(document).to_bytes(8, "big"))
            self._digest.update(document)
            place = fraction(document)
            side = int(place < self.val_fraction)
            self._documents[side] += 1
            self._bytes[side] += len(document)
            yield document, place, side
            if self._place.offset > 0:
                self._end([source, self._place.offset])

    def _end(self, end: list[int], text: str | None = None) -> None:
        """End a segment here if it is long enough."""
        if sum(self._bytes) >= SEGMENT:
            text = text or self._place.digest()
            sizes = {"documents": self._documents, "text_bytes": self._bytes, "notes": dict(self._notes)}
            self.segments.append({"end": end, "text": text, "sha256": self._digest.hexdigest(), **sizes})
            self._begin()

    def survey(self) -> Survey:
        """The survey of what was read."""
        digests = [segment["sha256"] for segment in self.segments] + [self._digest.hexdigest()]
        notes = Counter(self._notes)
        for segment in self.segments:
            notes += Counter(segment["notes"])
        sides = [
            [sum(each) for each in zip(last, *(segment[name] for segment in self.segments), strict=True)]
            for name, last in (("documents", self._documents), ("text_bytes", self._bytes))
        ]
        sha256 = digests[0] if len(digests) == 1 else atomic_io.digest_of(digests)
        corpus = self.corpus
        return Survey(
            sha256, corpus.rule, self.val_fraction, sides[0], sides[1], dict(notes),
            is_chat=corpus.is_chat, segments=self.segments, rules=corpus.rules,
        )  # fmt: skip


def check(survey: Survey, text: Text, own: Source | None) -> None:
    """TextError if the text or one of its sides holds too little. A fraction that the message advises was tried."""
    names, (train, validation) = ", ".join(text.files), survey.documents
    if train + validation == 0:
        raise TextError(f"{names}: there is nothing but whitespace: put your text there")
    if survey.is_split:
        return
    usual = Text.validation if text.validation > Text.validation else 0.0
    less, _ = survey_of(Corpus(text, own=own), usual, Show(lambda line: None, False))
    if train + validation == 1:
        fault = "one document cannot be on both sides"
    elif not train:
        fault = f"text.validation = {text.validation:g} holds all {validation} documents out"
    else:
        fault = f"{train + validation} documents are too small or too much alike to hold enough of them out"
    mend = f"text.validation={usual if less.is_split else 0:g}"
    raise TextError(f"{names}: {fault}: use more text, or {mend}")


def has_changed(text: Text, seen: dict[str, Any], sha256: str, cache: Path, show: Show) -> bool:
    """True if the text is another than the one of digest `sha256` that was `seen` as Corpus.seen says.

    It is read only if its files are not those of that time. TextError if it is not there or cannot be read.
    """
    corpus = Corpus(text, seen.get("most", MAX_DOCUMENT))
    if corpus.seen == seen or (not seen and (corpus.bytes_expected() or SEGMENT) >= SEGMENT):
        return False  # large texts had another digest in earlier versions, which recorded nothing of their files
    path = survey_path(cache, corpus, text)
    if path.is_file():
        return bool(Survey(**atomic_io.read_checksummed(path)).sha256 != sha256)
    survey, _ = survey_of(corpus, text.validation, show)
    if not read_only(path):
        atomic_io.write_checksummed(path, asdict(survey))
    return survey.sha256 != sha256
