"""One gradient out of a step's micro-batches, and the tree that defines its bits under `machine.exact`.

Exact: micro-batches are numbered over the whole world, number j * world + rank, and one balanced binary tree over
these numbers is summed: processes pairwise in the order of their ranks (sharding.py), then a process's own
micro-batches by a binary counter. Every world and layout computes that same tree, so the bits do not depend on it. It
holds log2(micro-batches of a process) further gradients, and exchanges after each micro-batch, not once a step.
"""

from torch import Tensor


class PairwiseSum:
    """A pairwise sum of lists of tensors that come one after the other, with log2(n) lists in memory."""

    def __init__(self) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []  # (how many were added, their sum), of falling size

    def add(self, tensors: list[Tensor]) -> None:
        count = 1
        while self.sums and self.sums[-1][0] == count:
            _, earlier = self.sums.pop()
            tensors = [a + b for a, b in zip(earlier, tensors, strict=True)]
            count *= 2
        self.sums.append((count, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all; of a balanced tree where their count is a power of two."""
        _, tensors = self.sums.pop()
        while self.sums:
            _, earlier = self.sums.pop()
            tensors = [a + b for a, b in zip(earlier, tensors, strict=True)]
        return tensors
