"""The survey: a text is read once for its digest and sizes, its split, and a sample to train a tokenizer on.

The result is cached under the identity of the text's files, so that they are read again only if they changed.
"""

import hashlib
import heapq
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import TextError
from llm.config.schema import Text
from llm.data.documents import MAX_DOCUMENT, PAGE, Corpus, fraction
from llm.data.progress import Say, Show
from llm.data.sources import Source

SAMPLE = 16 << 20  # bytes of text at most to train a tokenizer on: more changes few pieces and costs memory
MEASURABLE = 1 << 10  # least bytes of the validation side: some 300 tokens, which give its loss to 0.15 nats
LEAST = 256  # least bytes of the validation side of a very small text
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
def alone(path: Path, what: str, say: Say) -> Iterator[None]:
    """Hold the lock of a cache entry; a process that has to wait for another says so. A read-only cache needs none."""
    lock = path.parent.parent / "locks" / f"{path.parent.name}-{path.stem}.lock"
    if read_only(lock.parent):
        yield
        return
    with ExitStack() as held:
        if not held.enter_context(atomic_io.lock(lock)):
            say(f"another process prepares {what}: waiting for it")
            held.enter_context(atomic_io.lock(lock, wait=True))
        atomic_io.sweep(path.parent, of=path.name)
        yield


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
    with alone(path, "this text", show.say):
        if path.is_file() and not verify:
            survey = Survey(**atomic_io.read_checksummed(path))
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
    digest, notes = hashlib.sha256(), Counter[str]()
    documents, text_bytes = [0, 0], [0, 0]
    sample: list[tuple[float, int, bytes]] = []
    sampled = 0
    sizes: Counter[float] = Counter()
    for number, document in enumerate(show.over(corpus.documents(notes), "reading", corpus.bytes_expected(), len)):
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document)
        place = fraction(document)
        side = int(place < val_fraction)
        documents[side] += 1
        text_bytes[side] += len(document)
        sizes[place] += len(document)
        if len(sizes) > 2 * MEASURABLE:
            sizes = Counter(dict(sorted(sizes.items())[:MEASURABLE]))
        if side == 0 and (sampled + len(document) <= SAMPLE or place < -sample[0][0]):
            heapq.heappush(sample, (-place, number, document))
            sampled += len(document)
            while sampled > SAMPLE:
                sampled -= len(heapq.heappop(sample)[2])
    survey = Survey(digest.hexdigest(), corpus.rule, val_fraction, documents, text_bytes, dict(notes), corpus.is_chat)
    return survey, [document for _, _, document in sorted(sample, key=lambda each: each[1])], sizes


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
    if corpus.seen == seen:
        return False
    path = survey_path(cache, corpus, text)
    if path.is_file():
        return bool(Survey(**atomic_io.read_checksummed(path)).sha256 != sha256)
    survey, _ = survey_of(corpus, text.validation, show)
    if not read_only(path):
        atomic_io.write_checksummed(path, asdict(survey))
    return survey.sha256 != sha256
