"""The batches that this process reads at a step: a function of recipe and step, with no state to save or restore."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm.base.constants import IGNORED
from llm.data.mixture import Order
from llm.data.packing import WindowTable
from llm.data.shards import Split
from llm.data.shuffle import segments_of


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # (B, T) of int64
    targets: Tensor  # (B, T) of int64: the token after each, or IGNORED
    windows: Tensor  # (B,) of int64: positions in the order
    segments: Tensor | None = None  # (B, T) of int64: the document of each token; None: attention crosses documents

    def to(self, device: torch.device) -> "Batch":
        moved = (
            x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
            for x in (self.tokens, self.targets, self.windows, self.segments)
            if x is not None
        )
        return Batch(*moved)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the model's forward."""
        whole = (self.tokens, self.targets, self.windows)
        return whole if self.segments is None else (*whole, self.segments)


@dataclass(frozen=True)
class BatchLoader:
    """Windows of the training side in shuffled order, `windows_per_step` a step, dealt to ranks by micro-batch.

    Micro-batch m of a step holds the same windows in any world; `rank` runs those with m = rank modulo `world`. The
    windows of `skipped` steps (first, last; counted from 1) are left out: those steps read the windows that follow.
    Everywhere else in this class, `step` counts the updates done before it.
    """

    side: Split
    order: Order
    windows_per_step: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    skipped: tuple[tuple[int, int], ...] = ()

    def first(self, step: int) -> int:
        """Position of the first window that all ranks together read at `step`."""
        return batch_at(step, self.skipped) * self.windows_per_step

    def read(self, steps: int) -> Iterator[tuple[int, int]]:
        """Ranges low .. high - 1 of the positions that the first `steps` updates read."""
        low, end = 0, self.first(steps)
        for begin, last in sorted(self.skipped):
            if (begin - 1) * self.windows_per_step < end:
                yield low, (begin - 1) * self.windows_per_step
                low = last * self.windows_per_step
        yield low, max(low, end)

    def positions(self, step: int) -> list[np.ndarray]:
        """Positions of this rank's windows at `step`: an int64 array for each micro-batch."""
        first = self.first(step)
        stride = self.micro_batch * self.world
        return [
            np.arange(low, low + self.micro_batch)
            for low in range(first + self.rank * self.micro_batch, first + self.windows_per_step, stride)
        ]

    def at(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches at `step`."""
        for positions in self.positions(step):
            tokens, targets, segments = self.order.rows(self.side, positions)
            yield _batch(tokens, targets, segments, positions)


def batch_at(step: int, skipped: tuple[tuple[int, int], ...]) -> int:
    """The number, from 0, of the batch that is read after `step` updates: `skipped` ones (first, last) count from 1."""
    for low, high in sorted(skipped):
        if step + 1 >= low:
            step += high - low + 1
    return step


def _batch(tokens: np.ndarray, targets: np.ndarray, segments: np.ndarray | None, windows: np.ndarray) -> Batch:
    row = torch.from_numpy
    return Batch(row(tokens), row(targets), row(windows), None if segments is None else row(segments))


@dataclass(frozen=True)
class Tokens:
    """Tokens in memory, with the interface of `Split`."""

    ids: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def eval_batches(
    side: Split | Tokens, context: int, rows: int, rank: int = 0, world: int = 1, begin: int | None = None
) -> Iterator[Batch]:
    """Batches of `rows` windows without overlap, in which every token but the first is a target once.

    Every rank gets the same number of batches, filled up with IGNORED targets at the end. Attention stays within
    documents if `begin`, the token with which each begins, is given.
    """
    stride = rows * context
    rounds = -(-(side.tokens - 1) // (world * stride))
    for low in range(rank * stride, rounds * world * stride, world * stride):
        tokens = side.read(min(low, side.tokens), min(low + stride + 1, side.tokens)).astype(np.int64)
        count = max(len(tokens) - 1, 0)
        size = max(1, -(-count // context)) * context
        inputs, targets = np.zeros(size, np.int64), np.full(size, IGNORED, np.int64)
        inputs[:count], targets[:count] = tokens[:count], tokens[1:]
        windows = inputs.reshape(-1, context)
        places = np.zeros(len(windows), np.int64)
        yield _batch(windows, targets.reshape(-1, context), segments_of(windows, begin), places)


def packed_batches(table: WindowTable, rows: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Batches of `rows` windows of a table, each once; every rank gets the same number, filled up without targets."""
    rounds = -(-len(table.windows) // (world * rows))
    for low in range(rank * rows, rounds * world * rows, world * rows):
        indices = np.arange(low, low + rows)
        indices[indices >= len(table.windows)] = -1
        yield _batch(*table.rows(indices), np.zeros(rows, np.int64))
