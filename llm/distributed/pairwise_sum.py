"""Pairwise sum of a step's micro-batch gradients: the tree that defines their bits under `machine.exact`.

Micro-batch j of a rank has the number j * world + rank. Gradients are summed by one balanced binary tree over these
numbers: first over ranks (sharding.py), then over a rank's own micro-batches. Any number of ranks, sharded or not,
computes the same tree and so the same bits. The price: memory for log2(micro-batches per rank) extra gradients, and
communication after each micro-batch instead of once a step.
"""

from torch import Tensor


class PairwiseSum:
    """Pairwise sum of lists of tensors that arrive one at a time, with log2(n) lists in memory (a binary counter)."""

    def __init__(self) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []  # (number of lists, their sum), largest first

    def add(self, tensors: list[Tensor]) -> None:
        count = 1
        while self.sums and self.sums[-1][0] == count:
            tensors = self._plus_last(tensors)
            count *= 2
        self.sums.append((count, tensors))

    def total(self) -> list[Tensor]:
        """Sum of everything added; the tree is balanced if the count is a power of two."""
        _, tensors = self.sums.pop()
        while self.sums:
            tensors = self._plus_last(tensors)
        return tensors

    def _plus_last(self, tensors: list[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(self.sums.pop()[1], tensors, strict=True)]
