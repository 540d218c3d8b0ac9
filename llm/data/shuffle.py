"""The order of the training windows: a keyed permutation per epoch, computed rather than stored.

The windows of any step thus follow from (seed, step) alone. Each epoch's windows begin at another offset, so that no
token is always the first of its window.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llm.base.hashing import mix


def permuted(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The image of each `index` under a permutation of 0 .. size - 1 chosen by `key`: int64, in the shape of `index`.

    A Feistel network on the next even number of bits, walked until it falls below `size` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): fewer than four walks on average.
    """
    half = np.uint64(max(1, -(-max(1, size - 1).bit_length() // 2)))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix(key, round)) for round in range(6)]
    value = index.astype(np.uint64)
    todo = np.ones(value.shape, dtype=bool)
    while todo.any():
        left, right = value[todo] >> half, value[todo] & low
        for round_key in keys:
            scrambled = (right + round_key) * np.uint64(0xBF58476D1CE4E5B9)
            scrambled = (scrambled ^ (scrambled >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((scrambled >> np.uint64(32)) & low)
        value[todo] = (left << half) | right
        todo = value >= size
    return value.astype(np.int64)


def segments_of(tokens: np.ndarray, begin: int | None) -> np.ndarray | None:
    """The number, in its window, of the document that each of `tokens` (windows, context) belongs to."""
    return None if begin is None else np.cumsum(tokens == begin, axis=1)


class Row(Protocol):
    """Tokens end to end, as a Split has them."""

    def read(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class WindowShuffle:
    """The shuffled order of windows (`context` tokens and the one after) over a training side of `tokens` tokens.

    Attention stays within documents if `begin`, the token with which each begins, is given.
    """

    seed: int
    tokens: int
    context: int
    begin: int | None = None

    @property
    def windows(self) -> int:
        """Windows per epoch: one fewer than fit (but at least 1), to leave room for the offset."""
        return max(1, self.tokens // self.context - 1)

    def offset(self, epoch: int) -> int:
        """First token of the first window of `epoch`, drawn from all that leave room, so that the end is read too."""
        slack = self.tokens - 1 - self.windows * self.context
        return mix(self.seed, epoch, 1) % (slack + 1)

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the window at each of `positions`, int64 in their shape."""
        starts = np.empty(positions.shape, dtype=np.int64)
        epochs = positions // self.windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index = permuted(positions[here] % self.windows, self.windows, mix(self.seed, int(epoch), 0))
            starts[here] = self.offset(int(epoch)) + index * self.context
        return starts

    def ids(self, side: Row, position: int) -> np.ndarray:
        """The tokens of the window at `position`, with the one after."""
        start = int(self.starts(np.array([position]))[0])
        return side.read(start, start + self.context + 1)

    def rows(self, side: Row, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens, targets and segments (positions, context) of int64; no segments if attention crosses documents."""
        starts = self.starts(positions).tolist()
        rows = np.stack([side.read(start, start + self.context + 1) for start in starts]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:], segments_of(rows[:, :-1], self.begin)
