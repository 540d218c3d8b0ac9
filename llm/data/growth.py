"""Texts that change: appended to, edited, with files added or removed.

The cache remembers how each text was last prepared. When the same names hold another text of which at least half is as
it was, its tokenizer, its rules and the fraction held out stay, so that each document that stays remains on its side;
only new documents are encoded, and what is gone is left out.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.config.schema import Recipe, Text
from llm.data.documents import Corpus, Place, key_of
from llm.data.progress import Show
from llm.data.reuse import KnownTokens
from llm.data.shards import Shards
from llm.data.survey import Reading, Survey, read_only
from llm.data.tokenizer import Tokenizer

BATCH = 4096  # documents that are looked up at once
MOST_BYTES = 1 << 30  # of a record: a folder may hold a million files


@dataclass(frozen=True)
class Past:
    """How a text was last prepared. `tokenizer` is empty where one was given."""

    corpus: list[Any]  # Corpus.identity
    most: int
    survey: dict[str, Any]
    shards: str
    tokenizer: str


@dataclass(frozen=True)
class Grown:
    """A text as it is now, which goes on from its past."""

    corpus: Corpus
    survey: Survey
    tokenizer: str


def names_of(text: Text) -> list[str]:
    return [name if name.startswith("hub:") else str(atomic_io.expanded(name).absolute()) for name in text.files]


def _path(cache: Path, recipe: Recipe, tokenizer: Tokenizer | None) -> Path:
    """The record of the text that these names mean, prepared in this way."""
    text, wanted, names = recipe.text, recipe.tokenizer, names_of(recipe.text)
    model = wanted.path and str(atomic_io.expanded(wanted.path).absolute())
    by = tokenizer.fingerprint if tokenizer else [wanted.vocabulary, wanted.terms, model]
    return cache / "texts" / f"{atomic_io.digest_of([names, text.documents, text.field, text.validation, by])}.json"


def find(cache: Path, recipe: Recipe, tokenizer: Tokenizer | None) -> Past | None:
    """How this text was last prepared with the recipe's or the given tokenizer. RefusedError if that is damaged."""
    path = _path(cache, recipe, tokenizer)
    try:
        return Past(**atomic_io.read_checksummed(path, MOST_BYTES)) if path.is_file() else None
    except (RefusedError, TypeError) as error:
        raise RefusedError(f"{path} is damaged ({error}): remove it, and the text is prepared anew") from error


def record(cache: Path, recipe: Recipe, tokenizer: Tokenizer | None, past: Past) -> None:
    """Remember how this text was prepared, unless that is known, or the cache may not be written to."""
    path = _path(cache, recipe, tokenizer)
    if not read_only(path) and not (path.is_file() and find(cache, recipe, tokenizer) == past):
        atomic_io.write_checksummed(path, asdict(past))


def follow(past: Past, text: Text, cache: Path, show: Show, *, verify: bool) -> Grown | None:
    """The text as it is now, read from where it differs; None if more than half of what it held is gone."""
    survey = Survey(**past.survey)
    corpus = Corpus(text, past.most, rules=survey.rules)
    if corpus.identity == past.corpus and not verify:
        return Grown(corpus, survey, past.tokenizer)
    if corpus.is_chat != survey.is_chat:
        return None
    segments = [] if verify else _unchanged(corpus, past.corpus, survey)
    reading = Reading(corpus, survey.share, segments)
    try:
        shards = Shards.open(cache / "shards" / past.shards)
    except RefusedError:
        return None
    known = KnownTokens(shards)
    there = np.zeros(len(known.keys), bool)
    for side, count in enumerate(common(shards, reading.survey())):
        there[known.number(side, 0) : known.number(side, count)] = True
    keys: list[int] = []
    sizes: list[int] = []
    new = new_bytes = 0

    def look_up() -> None:
        nonlocal new, new_bytes
        numbers = known.find(np.array(keys, np.uint64), np.array(sizes, np.int32))
        there[numbers[numbers >= 0]] = True
        new += int((numbers < 0).sum())
        new_bytes += int(np.array(sizes)[numbers < 0].sum())
        keys.clear()
        sizes.clear()

    expected = (corpus.bytes_expected() or 0) - sum(sum(segment["text_bytes"]) for segment in segments)
    for document, _, _ in show.over(reading, "reading", max(expected, 0) or None, lambda read: len(read[0])):
        keys.append(key_of(document))
        sizes.append(len(document))
        if len(keys) == BATCH:
            look_up()
    if keys:
        look_up()
    _, same = np.unique(known.keys, return_inverse=True)  # a document that stands there twice is found once
    there = np.bincount(same, there, minlength=1)[same] > 0
    found = reading.survey()
    whole, kept = sum(survey.text_bytes), int(known.lengths[there].sum())
    if not len(known.keys) or 2 * kept < whole or not found.is_split:
        return None
    if found.sha256 != survey.sha256:
        gone = int((~there).sum())
        said = f"{new:,} documents ({new_bytes / 1e6:,.1f} MB) are new since it was last prepared, {gone:,} are gone"
        if not (new or gone):
            said = "its documents are unchanged, but their order or number differs from the last preparation"
        show.say(f"text: {said}; the tokenizer stays (--new-tokenizer of llm.prepare trains another)")
    return Grown(corpus, found, past.tokenizer)


def _unchanged(corpus: Corpus, past: list[Any], survey: Survey) -> list[dict[str, Any]]:
    """The leading segments of the survey whose text is as it was."""
    theirs, ours = past[-1], [source.identity for source in corpus.sources]
    same = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    here = same if same < len(ours) else -1  # a segment that ends with the text is not ended there
    segments = [each for each in survey.segments if each["end"][0] < same or each["end"] == [here, 0]]
    rest = survey.segments[len(segments) :]
    if same < min(len(theirs), len(ours)) and corpus.sources[same].is_plain and theirs[same][0] == ours[same][0]:
        chunks = iter(next(corpus.sources[same].texts(Counter())))
        chunk, read = b"", 0
        for segment in rest:
            if segment["end"][0] != same:
                break
            digest, end = hashlib.sha256(), segment["end"][1]
            while read < end and (chunk := chunk or next(chunks, b"")):
                part, chunk = chunk[: end - read], chunk[end - read :]
                digest.update(part)
                read += len(part)
            if read < end or digest.hexdigest() != segment["text"]:
                break
            segments.append(segment)
    return segments


def shards_of(past: Past, cache: Path, survey: Survey, tokenizer: Tokenizer) -> Shards | None:
    """The shards of that time, if they are whole, of the same tokens and the same sides."""
    try:
        shards = Shards.open(cache / "shards" / past.shards)
    except RefusedError:
        return None
    same = shards.manifest["tokenizer"] == tokenizer.fingerprint and shards.manifest["validation"] == survey.share
    return shards if same and shards.train.has_keys and shards.is_chat == survey.is_chat else None


def common(old: Shards | None, survey: Survey) -> list[int]:
    """The documents of each side at the beginning of the text that are those of the old shards."""
    counts = [0, 0]
    if old is not None:
        for mine, theirs in zip(survey.segments, old.manifest.get("segments", []), strict=False):
            if mine["sha256"] != theirs:
                break
            counts = [sum(each) for each in zip(counts, mine["documents"], strict=True)]
    return counts


def begin(survey: Survey, done: list[int], kept: list[int]) -> tuple[Place, list[int]]:
    """Where to read from if `done` documents are in files and the first `kept` known; the documents before that."""
    place, before, counts = Place(), [0, 0], [0, 0]
    for segment in survey.segments:
        counts = [sum(each) for each in zip(counts, segment["documents"], strict=True)]
        if any(count > max(there, old) for count, there, old in zip(counts, done, kept, strict=True)):
            break
        place, before = Place(*segment["end"]), counts
    return place, before
