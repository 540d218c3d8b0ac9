"""Whole conversations in windows: a table made from the shards when they are opened, permuted in each epoch.

Both are functions of the shards, the context and the seed, so that the windows of a step still follow from (recipe,
step) alone. Where conversations share a window, none sees another: `segments` tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from llm.base.constants import IGNORED
from llm.base.hashing import mix
from llm.config.schema import Recipe
from llm.data.chat_template import ANSWER, TURN
from llm.data.shards import Shards, Split
from llm.data.shuffle import Row, WindowShuffle, permuted

OPEN = 64  # windows that a conversation may still be put into: the oldest is closed first


class Side(Protocol):
    """Conversations end to end, as a Split has them."""

    tokens: int

    def read(self, start: int, stop: int) -> np.ndarray: ...
    def parts(self, start: int, stop: int) -> np.ndarray: ...
    def document_starts(self) -> np.ndarray: ...


class Conversations:
    """A Side in memory: ids, the part of each, and where each conversation begins."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, parts: np.ndarray) -> None:
        self._ids, self._starts, self._parts, self.tokens = ids, starts, parts, len(ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._ids[start:stop]

    def parts(self, start: int, stop: int) -> np.ndarray:
        return self._parts[start:stop]

    def document_starts(self) -> np.ndarray:
        return self._starts


@dataclass(frozen=True)
class Piece:
    """A conversation, or a part of one: tokens begin..end-1 after those of `prefix`, which is repeated.

    Of these only tokens from `counted` on are targets, so that none is one in two pieces.
    """

    begin: int
    end: int
    prefix: tuple[int, int]
    counted: int

    @property
    def size(self) -> int:
        """Tokens that are read: all but the last."""
        return self.end - self.begin + self.prefix[1] - self.prefix[0] - 1


@dataclass(frozen=True)
class WindowTable:
    """The windows of one side, each of a few pieces. `everything` makes targets of all tokens, not of answers only."""

    side: Side
    context: int
    everything: bool

    @cached_property
    def _found(self) -> tuple[list[Piece], int, int]:
        """Pieces with a target, in order; how many conversations were cut, and how many pieces were left out."""
        side, pieces, cut, without = self.side, [], 0, 0
        bounds = [*side.document_starts().tolist(), side.tokens]
        for begin, end in pairwise(bounds):
            parts = side.parts(begin, end)
            cut += end - begin - 1 > self.context
            for piece in _cut(begin, end, parts, self.context):
                if self._learnt(piece).any():
                    pieces.append(piece)
                else:
                    without += 1
        return pieces, cut, without

    @property
    def cut(self) -> int:
        """Conversations that are longer than the context."""
        return self._found[1]

    @property
    def left_out(self) -> int:
        """Pieces without a target."""
        return self._found[2]

    @cached_property
    def windows(self) -> list[list[Piece]]:
        """First fit among the last OPEN windows, in the order of the documents."""
        whole: list[list[Piece]] = []
        open_: list[tuple[int, list[int]]] = []  # index of a window, and the room left in it
        for piece in self._found[0]:
            room = next((room for room in open_ if room[1][0] >= piece.size), None)
            if room is None:
                room = (len(whole), [self.context])
                whole.append([])
                open_ = [each for each in [*open_, room] if each[1][0] > 1][-OPEN:]
            whole[room[0]].append(piece)
            room[1][0] -= piece.size
        return whole

    @cached_property
    def targets(self) -> int:
        return sum(int(self._learnt(piece).sum()) for piece in self._found[0])

    def target_ids(self) -> np.ndarray:
        """The ids of all targets, in no particular order."""
        found = [self._ids(piece)[1:][self._learnt(piece)] for piece in self._found[0]]
        return np.concatenate([np.empty(0, np.int64), *found])

    @cached_property
    def firsts(self) -> np.ndarray:
        """First token of each window."""
        return np.array([window[0].begin for window in self.windows], np.int64)

    @property
    def fill(self) -> float:
        """The fraction of the windows' tokens that is not padding."""
        return sum(piece.size for piece in self._found[0]) / max(1, len(self.windows) * self.context)

    def ids(self, index: int) -> np.ndarray:
        """The tokens of a window's pieces, end to end."""
        return np.concatenate([self._ids(piece) for piece in self.windows[index]])

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and segments (windows, context) of int64; an index of -1 is a window without a target."""
        size = (len(indices), self.context)
        tokens, targets = np.zeros(size, np.int64), np.full(size, IGNORED, np.int64)
        segments = np.zeros(size, np.int64)
        for row, index in enumerate(indices.tolist()):
            at = 0
            for number, piece in enumerate(self.windows[index] if index >= 0 else []):
                ids, here = self._ids(piece), slice(at, at + piece.size)
                tokens[row, here], segments[row, here] = ids[:-1], number
                targets[row, here] = np.where(self._learnt(piece), ids[1:], IGNORED)
                at += piece.size
            segments[row, at:] = len(self.windows[index]) if index >= 0 else 0
        return tokens, targets, segments

    def _ids(self, piece: Piece) -> np.ndarray:
        """(size + 1,) of int64"""
        parts = (self.side.read(*piece.prefix), self.side.read(piece.begin, piece.end))
        return np.concatenate(parts).astype(np.int64)

    def _learnt(self, piece: Piece) -> np.ndarray:
        """Whether each token after the first is a target: (size,) of bool."""
        prefix, first = piece.prefix[1] - piece.prefix[0], max(piece.begin, piece.counted)
        learnt = np.zeros(piece.size + 1, bool)
        learnt[prefix + first - piece.begin :] = self.everything or self.side.parts(first, piece.end) == ANSWER
        return learnt[1:]


def _cut(begin: int, end: int, parts: np.ndarray, context: int) -> list[Piece]:
    """A conversation of tokens begin..end-1 as pieces of at most `context` + 1 tokens, each from a user's turn on.

    What stands before the first turn is repeated, unless it is longer than half a window and leaves no room for the
    exchange. An exchange that is longer than a window goes on in pieces that begin with the half window before.
    """
    most = context + 1
    if end - begin <= most:
        return [Piece(begin, end, (begin, begin), begin + 1)]
    turns = [begin + at for at in np.flatnonzero(parts == TURN).tolist()]
    prefix = (begin, turns[0] if turns else begin)
    bounds = [begin, *turns[1:], end]
    pieces: list[Piece] = []
    first = 0
    while first < len(bounds) - 1:
        low = bounds[first]
        fits = prefix[1] - begin <= most // 2 or prefix[1] - begin + bounds[first + 1] - low <= most
        repeated = prefix if low > begin and fits else (begin, begin)
        room = most - (repeated[1] - repeated[0])
        last = first + 1
        while last + 1 < len(bounds) and bounds[last + 1] - low <= room:
            last += 1
        high = bounds[last]
        done = min(high, low + room)
        pieces.append(Piece(low, done, repeated, max(low, begin + 1)))
        while done < high:
            start = done - most // 2
            reach = min(high, start + most)
            pieces.append(Piece(start, reach, (begin, begin), done))
            done = reach
        first = last
    return pieces


@dataclass(frozen=True)
class PackedShuffle:
    """The shuffled order of a table's windows. The interface of WindowShuffle."""

    seed: int
    table: WindowTable

    @property
    def windows(self) -> int:
        """Windows per epoch."""
        return len(self.table.windows)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The window of the table at each of `positions`."""
        found = np.empty(positions.shape, dtype=np.int64)
        epochs = positions // self.windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = permuted(positions[here] % self.windows, self.windows, mix(self.seed, int(epoch), 0))
        return found

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the window at each of `positions`."""
        return self.table.firsts[self.indices(positions)]

    def ids(self, side: Split, position: int) -> np.ndarray:
        return self.table.ids(int(self.indices(np.array([position]))[0]))

    def rows(self, side: Split, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return self.table.rows(self.indices(positions))


def table_of(recipe: Recipe, side: Side) -> WindowTable:
    return _table(side, recipe.model.context, recipe.train.on == "all")


# A start and each evaluation ask for the same tables, which take seconds.
_table: Callable[..., WindowTable] = lru_cache(maxsize=16)(WindowTable)


def order_of(recipe: Recipe, shards: Shards) -> WindowShuffle | PackedShuffle:
    """The order of the training windows."""
    if shards.is_chat:
        return PackedShuffle(recipe.seed, table_of(recipe, shards.train))
    begin = begin_of(recipe, shards.train)
    return WindowShuffle(recipe.seed, shards.train.tokens, recipe.model.context, begin)


def begin_of(recipe: Recipe, side: Row) -> int | None:
    """The token with which each document of a side begins; None if the recipe lets attention cross documents."""
    return int(side.read(0, 1)[0]) if recipe.train.document_mask else None


def tokens_per_epoch(recipe: Recipe, shards: Shards) -> int:
    """The tokens that an epoch reads: those of the training side, or of the windows that hold its conversations."""
    order = order_of(recipe, shards)
    return shards.train.tokens if isinstance(order, WindowShuffle) else order.windows * recipe.model.context
