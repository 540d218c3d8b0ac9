"""Near duplicates among documents: MinHash (Broder, 1997) and locality-sensitive hashing (Indyk and Motwani, 1998).

Two documents are alike if they share at least ALIKE of their shingles, runs of WORDS words (the Jaccard index); case,
punctuation and white space do not count. numpy reads a block of documents at once. A document costs 80 bytes; where
there are more than `most`, a half is dropped as often as needed, by content, so that documents that are alike stay
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORDS = 3
HASHES, BANDS = 64, 16  # minimal hashes of a document, and groups of them of which one has to be equal
ALIKE = 0.65
MOST = 1 << 22  # documents with signatures: 336 MB
ROWS = 1 << 16  # pairs compared at once

_RANDOM = np.random.default_rng(20261128)
_OF_BYTE = _RANDOM.integers(1, 1 << 63, 256, dtype=np.uint64)
_OF_BYTE[ord("A") : ord("Z") + 1] = _OF_BYTE[ord("a") : ord("z") + 1]
_FACTORS = _RANDOM.integers(1, 1 << 31, HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_BETWEEN = np.array([byte < 128 and not chr(byte).isalnum() for byte in range(256)])  # words
_LEADS = np.arange(256) >= 0xE0  # of characters of three or four bytes, as in Chinese: each is a word
_BASE = 0x9E3779B97F4A7C15


class _Powers:
    """Powers of an odd number and of its inverse modulo 2^64, as many as were asked for."""

    def __init__(self) -> None:
        self.up = self.down = np.ones(0, np.uint64)

    def reach(self, length: int) -> None:
        if len(self.up) < length:
            self.up, self.down = (_powers(base, length) for base in (_BASE, pow(_BASE, -1, 1 << 64)))


def _powers(base: int, length: int) -> np.ndarray:
    powers = np.full(length, base, np.uint64)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    return powers


_powers_of = _Powers()


def _spans_hashed(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A hash of each span of `values` (uint64), equal for equal spans: (spans,) of uint64."""
    _powers_of.reach(len(values) + 1)
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers_of.up[: len(values)], out=sums[1:])
    return _mixed((sums[ends] - sums[begins]) * _powers_of.down[begins])


def _mixed(x: np.ndarray) -> np.ndarray:
    """Bits of each number depend on all of its bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def signatures(block: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signatures of the documents of a block of bytes that begin at `starts`, each of which ends with a separator.

    Which documents have one, as they hold a word: (n,) of int; their signatures: (n, HASHES) of uint8.
    """
    between = _BETWEEN[block]
    begins = ~between & np.concatenate([[True], between[:-1]]) | _LEADS[block]
    edges = np.flatnonzero(begins | between)
    is_word = begins[edges]
    ends = np.append(edges[1:], len(block))[is_word]
    begins_at = edges[is_word]
    if not len(begins_at):
        return np.zeros(0, int), np.zeros((0, HASHES), np.uint8)
    words = _spans_hashed(_OF_BYTE[block], begins_at, ends)
    document = np.searchsorted(starts, begins_at, "right") - 1
    shingles, of = _shingles(words, document)
    first = np.flatnonzero(np.diff(of, prepend=-1))
    found = np.empty((len(first), HASHES), np.uint8)
    hashed = np.empty_like(shingles)
    for column, factor in enumerate(_FACTORS):
        np.multiply(shingles, factor, out=hashed)
        found[:, column] = np.minimum.reduceat(hashed, first)  # its lowest byte
    return of[first], found


def _shingles(words: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of runs of WORDS words in one document, one at least of each: uint32, and the document of each."""
    whole, inside = words.copy(), np.ones(len(words), bool)
    for ahead in range(1, WORDS):
        together = np.zeros(len(words), bool)
        together[:-ahead] = document[ahead:] == document[:-ahead]
        whole[:-ahead] += np.where(together[:-ahead], words[ahead:], 0) * np.uint64(_BASE + 2 * ahead)
        inside &= together
    inside |= np.diff(document, prepend=-1) > 0  # the first run, however short the document is
    return (_mixed(whole[inside]) >> np.uint64(32)).astype(np.uint32), document[inside]


@dataclass(frozen=True)
class Alike:
    """Documents that are alike: `pairs` (n, 2) of their numbers, and the group of each sampled document."""

    pairs: np.ndarray
    numbers: np.ndarray  # of the sampled documents
    group: np.ndarray  # of each of them: the place of the first one it is alike to, directly or through others
    one_in: int  # documents sampled: one in so many


class Index:
    """Signatures of documents, numbered in the order in which they come."""

    def __init__(self, most: int = MOST) -> None:
        self.most, self.level, self.documents = most, 0, 0
        self._numbers: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._held = 0

    def add(self, documents: Sequence[bytes]) -> None:
        """The next documents; a few megabytes at once are quickest."""
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        starts = np.cumsum(lengths) - lengths
        which, rows = signatures(np.frombuffer(b"\n".join([*documents, b""]), np.uint8), starts)
        self._keep(self.documents + which, rows)
        self.documents += len(documents)
        while self._held > self.most:
            self.level += 1
            numbers, rows = self._joined()
            self._numbers, self._rows, self._held = [], [], 0
            self._keep(numbers, rows)

    def _keep(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        kept = rows[:, 0] & ((1 << self.level) - 1) == 0
        self._numbers.append(numbers[kept])
        self._rows.append(rows[kept])
        self._held += int(kept.sum())

    def _joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and rows as one array each; the parts are let go as they are copied."""
        numbers = np.concatenate([np.zeros(0, np.int64), *self._numbers])
        rows = np.empty((len(numbers), HASHES), np.uint8)
        at, parts, self._rows = 0, self._rows[::-1], []
        while parts:
            part = parts.pop()
            rows[at : at + len(part)] = part
            at += len(part)
        return numbers, rows

    def alike(self, is_first: np.ndarray) -> Alike:
        """The documents that are alike, among those for which `is_first` (by number) holds. The index is emptied."""
        numbers, rows = self._joined()
        if not is_first.all():
            kept = is_first[numbers]
            numbers, rows = numbers[kept], rows[kept]
        each = HASHES // BANDS
        found = [np.zeros((0, 2), np.int64)]
        for band in range(BANDS):
            keys = np.ascontiguousarray(rows[:, band * each : (band + 1) * each]).view(f"u{each}").ravel()
            found.append(_verified(rows, _collisions(keys)))
        pairs = np.unique(np.concatenate(found), axis=0)
        return Alike(numbers[pairs], numbers, _groups(len(numbers), pairs), 1 << self.level)


def _collisions(keys: np.ndarray) -> np.ndarray:
    """Pairs of places with equal keys: each with the one before, and with the first: (n, 2)."""
    order = np.argsort(keys, kind="stable")
    equal = np.concatenate([[False], keys[order][1:] == keys[order][:-1]]) if len(keys) else np.zeros(0, bool)
    at = np.flatnonzero(equal)
    first = np.maximum.accumulate(np.where(equal, 0, np.arange(len(keys))))[at]
    pairs = np.concatenate([np.stack([order[at - 1], order[at]], 1), np.stack([order[first], order[at]], 1)])
    pairs.sort(axis=1)
    return pairs


def _verified(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The pairs whose signatures agree in ALIKE of their places."""
    kept = [np.zeros((0, 2), np.int64)]
    for at in range(0, len(pairs), ROWS):
        some = pairs[at : at + ROWS]
        agree = np.count_nonzero(rows[some[:, 0]] == rows[some[:, 1]], axis=1)
        kept.append(some[agree >= ALIKE * HASHES])
    return np.unique(np.concatenate(kept), axis=0)


def _groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """The least place that each place is joined to by pairs."""
    group, before = np.arange(count), None
    while before is None or (group != before).any():
        before = group.copy()
        least = np.minimum(group[pairs[:, 0]], group[pairs[:, 1]])
        for side in (0, 1):
            np.minimum.at(group, pairs[:, side], least)
        group = group[group]
    return group
