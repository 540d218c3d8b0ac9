"""A survey of a text before training: what is in it, what to do about it, and what models and vocabularies it allows.

Memory: 12 bytes a document, 72 more for up to 4 million documents in which near duplicates are sought, counts of
characters and lines in tables of fixed size, and samples of SAMPLE bytes to train vocabularies and yardsticks on.
"""

import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from llm.base.errors import TextError
from llm.config.schema import Model, Text
from llm.data.conversations import text_of
from llm.data.documents import Corpus, fraction
from llm.data.progress import Show
from llm.data.survey import surveyed
from llm.data.tokenizer import Tokenizer
from llm.insight import baselines, near_duplicates
from llm.insight.near_duplicates import Alike
from llm.insight.text_counts import LONG_LINE, SHOWN, WIDTH, Counts
from llm.model import cost

BLOCK = 1 << 20  # bytes of documents that are looked at together
SAMPLE = 4 << 20  # bytes that vocabularies and yardsticks are trained on
VOCABULARIES = (1024, 2048, 4096, 8192, 16384, 32768)
QUICKSTART = Model(dim=192, layers=4, heads=3, kv_heads=3, head_dim=64, ffn_dim=512, context=256)
LISTED = 1000  # groups and leaks in the JSON


@dataclass(frozen=True)
class Finding:
    """Something that is there `count` times, with samples and what to do about it."""

    name: str
    count: int
    share: float  # of what `of` says
    of: str
    mend: str
    samples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Vocabulary:
    """The effect of a vocabulary of `pieces` on this text, in a model of quickstart's shape."""

    pieces: int
    bytes_per_token: float  # of held-out text, with a token that begins each document
    share: float  # of the parameters
    parameters: int
    context: int  # characters


@dataclass(frozen=True)
class Survey:
    """All that is reported. Documents are numbered from 1, in their order."""

    rule: str
    documents: list[int]  # for training, held out
    text_bytes: list[int]  # of conversations those of their messages
    characters: int
    lengths: list[int]  # documents of 2^i to 2^(i+1) - 1 bytes
    median: int  # bytes
    longest: int
    longest_line: int
    scripts: dict[str, float]  # shares of all letters
    findings: list[Finding]
    yardsticks: dict[str, float]  # bits per byte
    vocabularies: list[Vocabulary]
    notes: dict[str, int]
    groups: list[list[int]]  # documents that are alike
    leaked: list[int]  # held-out documents that are like one for training
    sampled: dict[str, int]


def survey(text: Text, show: Show) -> Survey:
    """Read the text three times: to split it as training does, to survey it, and, up to the last sample, for samples.

    TextError for a text that is not there or is nothing but white space.
    """
    with tempfile.TemporaryDirectory() as cache:
        corpus, split, sample = surveyed(text, Path(cache), show, verify=True)
    if not sum(split.documents):
        raise TextError(f"{', '.join(text.files)}: there is nothing but whitespace: put your text there")
    counts = Counts(split.share)
    for block in _blocks(show.over(corpus.documents(), "comparing", sum(split.text_bytes), len)):
        counts.add([text_of(each) for each in block] if split.is_chat else block, list(map(fraction, block)))
    duplicates = Duplicates(counts)
    texts = _openings(corpus, duplicates.shown, split.is_chat)
    train = _evenly([text_of(each) for each in sample] if split.is_chat else sample)
    sizes = np.concatenate(counts.sizes)
    return Survey(
        rule=split.rule,
        documents=split.documents,
        text_bytes=counts.text_bytes,
        characters=counts.characters,
        lengths=np.bincount(np.log2(sizes).astype(np.int64)).tolist(),
        median=int(np.median(sizes)),
        longest=int(sizes.max()),
        longest_line=counts.longest_line,
        scripts=counts.scripts(),
        findings=[*duplicates.findings(texts), *_characters(counts), *_markup(counts), *_lines(counts)],
        yardsticks=_yardsticks(train, counts.held_out, show),
        vocabularies=_vocabularies(train, counts, show),
        notes=split.notes,
        groups=duplicates.groups(LISTED),
        leaked=(duplicates.leaked[:LISTED] + 1).tolist(),
        sampled={
            "trained on": sum(map(len, train)),
            "measured on": sum(map(len, counts.held_out)),
            "near duplicates in one of": duplicates.alike.one_in,
        },
    )


def _blocks(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in lists of about BLOCK bytes."""
    block: list[bytes] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _evenly(documents: list[bytes]) -> list[bytes]:
    """Documents of about SAMPLE bytes at most, evenly from a list."""
    part = min(1.0, SAMPLE / max(1, sum(map(len, documents))))
    return [each for at, each in enumerate(documents) if int((at + 1) * part) > int(at * part)]


# ---------------------------------------------------------------------------------------------- what models it allows


def _yardsticks(train: list[bytes], held_out: list[bytes], show: Show) -> dict[str, float]:
    if not held_out:
        return {}
    show.say("measuring gzip, xz and a 5-gram")
    return baselines.yardsticks(b"".join(train), b"".join(held_out))


def _vocabularies(train: list[bytes], counts: Counts, show: Show) -> list[Vocabulary]:
    """One vocabulary is trained; the smaller ones are its first pieces, as BPE would find them."""
    show.say(f"training vocabularies on {sum(map(len, train)) / 1e6:,.1f} MB")
    sizes = list(VOCABULARIES)
    while True:
        try:
            largest = Tokenizer.train(train, vocab_size=sizes[-1])
            break
        except TextError:  # too little text for so many pieces, or too many characters for so few
            sizes.pop()
            if not sizes:
                return []
    documents = [each.decode() for each in counts.held_out or train]
    size, characters = sum(len(each.encode()) for each in documents), sum(map(len, documents))
    found = []
    for pieces, encoded in tokens_by_size(largest, documents, sizes).items():
        tokens = encoded + len(documents)
        parameters = cost.parameters(QUICKSTART, pieces)
        context = round(QUICKSTART.context * characters / tokens)
        found.append(Vocabulary(pieces, size / tokens, pieces * QUICKSTART.dim / parameters, parameters, context))
    return found


def tokens_by_size(tokenizer: Tokenizer, documents: list[str], sizes: list[int]) -> dict[int, int]:
    """Tokens of the documents under this vocabulary of BPE and those that BPE would have ended at earlier, by size.

    A smaller vocabulary has the first merges: a piece of a later one falls into the two that it was merged from.
    """
    names = [tokenizer.piece(id) for id in range(tokenizer.first_piece, tokenizer.vocab_size)]
    merges = {name: rank for rank, name in enumerate(name for name in names if len(name) > 1)}
    halves = {name: _merged(name, merges, rank) for name, rank in merges.items()}
    ids = np.concatenate([np.zeros(0, np.int32), *tokenizer.encode_batch(documents, threads=1)])
    counts = np.bincount(ids, minlength=tokenizer.vocab_size).tolist()
    found = {}
    for size in sizes:
        kept = len(merges) - (tokenizer.vocab_size - size)
        if kept < 0:
            continue
        parts: dict[str, int] = {}
        for name, rank in merges.items():
            parts[name] = 1 if rank < kept else sum(parts.get(half, 1) for half in halves[name])
        later = zip(names, counts[tokenizer.first_piece :], strict=True)
        found[size] = len(ids) + sum(count * (parts.get(name, 1) - 1) for name, count in later)
    return found


def _merged(name: str, merges: dict[str, int], most: int) -> list[str]:
    """The symbols of `name` after all merges of lower rank than `most`, in the order of their ranks."""
    symbols = list(name)
    while len(symbols) > 1:
        ranks = [merges.get(left + right, most) for left, right in pairwise(symbols)]
        if (least := min(ranks)) >= most:
            break
        at = ranks.index(least)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


# ---------------------------------------------------------------------------------------------- duplicates


class Duplicates:
    """Equal and similar documents, and those that are alike on both sides of the split."""

    def __init__(self, counts: Counts) -> None:
        places = np.concatenate(counts.places)
        counts.places.clear()
        order = np.argsort(places, kind="stable")
        again = np.concatenate([[False], np.diff(places[order]) == 0])
        self.documents = len(places)
        self.copies = order[again]  # each equals an earlier document
        is_first = np.ones(len(places), bool)
        is_first[self.copies] = False
        held_out = places < counts.val_fraction
        self.alike: Alike = counts.index.alike(is_first)
        here, group = held_out[self.alike.numbers], self.alike.group
        size = len(group)
        in_train = np.bincount(group[~here], minlength=size) > 0
        self.leaked = self.alike.numbers[here & in_train[group]]
        self.held_out = int(here.sum())
        self.near = size - len(np.unique(group))
        pairs = self.alike.pairs
        self.near_pairs = pairs[np.argsort(pairs.max(axis=1, initial=0), kind="stable")][:SHOWN]
        across = pairs[held_out[pairs[:, 0]] != held_out[pairs[:, 1]]]
        self.leaks = across[np.argsort(across.max(axis=1, initial=0), kind="stable")][:SHOWN]

    @property
    def shown(self) -> set[int]:
        """Numbers of the documents that are shown."""
        shown = np.sort(self.copies)[:SHOWN]
        return {*map(int, shown), *map(int, self.near_pairs.ravel()), *map(int, self.leaks.ravel())}

    def groups(self, most: int) -> list[list[int]]:
        """Groups of documents that are alike, numbered from 1."""
        group, numbers = self.alike.group, self.alike.numbers
        order = np.argsort(group, kind="stable")
        edges = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
        sizes = np.diff(edges)
        chosen = np.flatnonzero(sizes > 1)[:most]
        return [(numbers[order[edges[at] : edges[at] + sizes[at]]] + 1).tolist() for at in chosen]

    def findings(self, texts: dict[int, str]) -> Iterator[Finding]:
        if len(self.copies):
            samples = [f"document {number + 1}: {texts[number]}" for number in map(int, np.sort(self.copies)[:SHOWN])]
            share = len(self.copies) / self.documents
            mend = "keep one of each; equal documents always lie on one side, so they do not flatter the measurements"
            yield Finding("exact duplicates", len(self.copies), share, "documents", mend, samples)
        most, scale = max(len(self.alike.numbers), 1), self.alike.one_in
        if self.near:
            mend = (
                f"keep one of each group; they share {near_duplicates.ALIKE:.0%} or more of their runs of three words"
            )
            yield Finding(
                "near duplicates",
                self.near * scale,
                self.near / most,
                "documents",
                mend,
                _pairs(self.near_pairs, texts),
            )
        if len(self.leaked):
            mend = "held-out bits per byte are flattered by them: remove them from one side before you compare runs"
            share = len(self.leaked) / max(self.held_out, 1)
            name = "held-out documents that are like one for training"
            yield Finding(name, len(self.leaked) * scale, share, "held-out documents", mend, _pairs(self.leaks, texts))


def _pairs(pairs: np.ndarray, texts: dict[int, str]) -> list[str]:
    return [f"documents {left + 1} and {right + 1}: {texts[left]}" for left, right in pairs.tolist()]


def _openings(corpus: Corpus, wanted: set[int], is_chat: bool) -> dict[int, str]:
    """The openings of these documents, by number."""
    found: dict[int, str] = {}
    for number, document in enumerate(islice(corpus.documents(), max(wanted, default=-1) + 1)):
        if number in wanted:
            found[number] = (text_of(document) if is_chat else document)[: 4 * WIDTH].decode(errors="ignore")
    return found


# ---------------------------------------------------------------------------------------------- other findings


def _characters(counts: Counts) -> Iterator[Finding]:
    odd = {chr(point): int(counts.points[point]) for point in np.flatnonzero(counts.points) if _is_odd(chr(point))}
    if odd:
        most = sorted(odd, key=odd.__getitem__, reverse=True)[: 2 * SHOWN]
        samples = [f"U+{ord(each):04X} {_name(each)}: {odd[each]:,}" for each in most]
        count = sum(odd.values())
        yield Finding("control and invisible characters", count, count / counts.characters, "characters",
                      "remove them, unless a language or emoji need them (U+200C, U+200D); U+FFFD marks text that was "
                      "decoded wrongly: convert the source again", samples)  # fmt: skip


def _markup(counts: Counts) -> Iterator[Finding]:
    whole = max(counts.characters, 1)
    for name, count in counts.markup.items():
        mend = (
            "keep them, unless the model must not write URLs"
            if name == "URLs"
            else "extract plain text from the source, or the model will write markup"
        )
        yield Finding(name, count, count / whole, "characters", mend, counts.samples[name])


def _lines(counts: Counts) -> Iterator[Finding]:
    if counts.long_lines:
        mend = "harmless in prose of one paragraph a line; look for tables, code without line ends or base64"
        share = counts.long_lines / max(counts.lines, 1)
        yield Finding(
            f"lines of more than {LONG_LINE:,} bytes",
            counts.long_lines,
            share,
            "lines",
            mend,
            counts.samples["long lines"],
        )
    repeated, size, samples = counts.boilerplate.found()
    if repeated:
        mend = "remove menus, footers and licence lines: the model memorises them first"
        of = f"bytes, in {len(repeated):,} different lines"
        share = size / max(1, counts.boilerplate.bytes)
        yield Finding("repeated lines", sum(repeated), share, of, mend, samples)


def _is_odd(character: str) -> bool:
    return character not in "\n\t\r" and (
        unicodedata.category(character) in ("Cc", "Cf", "Co") or character == "\ufffd"
    )


def _name(character: str) -> str:
    return unicodedata.name(
        character, "control" if unicodedata.category(character) == "Cc" else "without a name"
    ).lower()
