"""Tokens that are known already: those of documents that an earlier preparation of a text encoded with this tokenizer.

A text that has grown is prepared as one whose preparation was killed: the shard files of its unchanged beginning are
linked, and documents that come later are looked up by the hash that splits them, and their length.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.base import atomic_io

if TYPE_CHECKING:
    from llm.data.shards import AnyShards, Shards, Split

JOURNAL = "journal.json"


class KnownTokens:
    """The documents of `shards` by their place: first those of the training side, then those held out."""

    def __init__(self, shards: "Shards") -> None:
        self._sides: list[Split] = [shards.train, shards.validation]
        self._begins = np.cumsum([0, *(side.documents for side in self._sides)])
        self.keys, self.lengths = (
            np.concatenate([getattr(side, name)() for side in self._sides])
            for name in ("document_keys", "document_sizes")
        )
        starts = [side.document_starts() for side in self._sides]
        self._starts = starts[0], starts[1]
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    def find(self, keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The number of each document: int64 like `keys`, -1 for one that is not known."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        found: np.ndarray = self._order[at]
        return np.where((self.keys[found] == keys) & (self.lengths[found] == lengths), found, -1)

    def number(self, side: int, document: int) -> int:
        """The number of a side's document."""
        return int(self._begins[side]) + document

    def tokens(self, first: int, last: int) -> dict[str, Any]:
        """Tokens and parts of the documents first..last, which lie on one side, end to end, and where each starts."""
        index = int(first >= self._begins[1])
        side, starts, begin = self._sides[index], self._starts[index], int(self._begins[index])
        whole = starts[first - begin : last - begin + 1]
        end = int(starts[last - begin + 1]) if last - begin + 1 < len(starts) else side.tokens
        found = {"tokens": side.read(int(whole[0]), end), "starts": whole - whole[0]}
        return found | ({"parts": side.parts(int(whole[0]), end)} if side.has_parts else {})


def merged(encoded: dict[str, Any], numbers: np.ndarray, known: KnownTokens | None) -> dict[str, Any]:
    """The tokens of a block's documents in their order: those of `encoded`, and where `numbers` >= 0 the known ones."""
    if known is None or (numbers < 0).all():
        return encoded
    names: list[str] = [name for name in ("tokens", "parts") if name in encoded]
    ends = np.append(encoded["starts"], len(encoded["tokens"]))
    pieces: list[dict[str, Any]] = []
    taken = 0
    for first, last in _runs(numbers):
        if numbers[first] >= 0:
            pieces.append(known.tokens(int(numbers[first]), int(numbers[last])))
        else:
            count = last - first + 1
            begin, end = ends[taken], ends[taken + count]
            piece: dict[str, Any] = {name: encoded[name][begin:end] for name in names}
            pieces.append({**piece, "starts": ends[taken : taken + count] - begin})
            taken += count
    offsets = np.cumsum([0, *(len(piece["tokens"]) for piece in pieces)])
    whole: dict[str, Any] = {name: np.concatenate([piece[name] for piece in pieces]) for name in names}
    starts = np.concatenate([piece["starts"] + at for piece, at in zip(pieces, offsets[:-1], strict=True)])
    return {**encoded, **whole, "starts": starts}


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of each run of documents that follow each other in the known ones, or are all new."""
    steps = np.diff(numbers)
    breaks = np.flatnonzero(np.where(numbers[1:] < 0, numbers[:-1] >= 0, (steps != 1) | (numbers[:-1] < 0))) + 1
    bounds = [0, *breaks.tolist(), len(numbers)]
    for begin, end in pairwise(bounds):
        yield begin, end - 1


def link(shards: "Shards", folder: Path, documents: list[int]) -> None:
    """Give a new `folder` the leading files of `shards` that hold only the first `documents` (train, validation).

    The last file of a side is left out, as more documents go into it.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    for (side, whole), most in zip(shards.manifest["files"].items(), documents, strict=True):
        counts = np.cumsum([file["documents"] for file in whole])
        files[side] = whole[: min(int(np.searchsorted(counts, most, side="right")), len(whole) - 1)] if whole else []
        for file in files[side]:
            mine, theirs = folder / file["name"], shards.folder / file["name"]
            try:
                os.link(theirs, mine)
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                atomic_io.write_bytes(mine, theirs.read_bytes())
    atomic_io.write_json(folder / JOURNAL, files)


def difference(ours: "AnyShards", theirs: "AnyShards") -> tuple[int, int] | None:
    """How many documents are in `ours` alone and in `theirs` alone; None where shards of an earlier version hide it."""
    keys = [np.concatenate([each.train.document_keys(), each.validation.document_keys()]) for each in (ours, theirs)]
    if any(len(found) < each.train.documents for found, each in zip(keys, (ours, theirs), strict=True)):
        return None
    return int((~np.isin(keys[0], keys[1])).sum()), int((~np.isin(keys[1], keys[0])).sum())
