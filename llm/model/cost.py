"""Costs of a model by formula: parameters, FLOPs per token, bytes in memory and bytes over the network."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from llm.config.schema import Model

Shapes: TypeAlias = list[tuple[int, ...]]


def tensors(shape: Model, vocab_size: int) -> tuple[Shapes, Shapes, Shapes]:
    """Shapes of one block's matrices and vectors, and of the tensors outside the blocks."""
    queries, keys, dim, ffn = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.dim, shape.ffn_dim
    matrices: Shapes = [(queries, dim), (keys, dim), (keys, dim), (dim, queries), (ffn, dim), (ffn, dim), (dim, ffn)]
    ends: Shapes = [(vocab_size, dim)] * (1 if shape.tied else 2) + [(dim,)]
    return matrices, [(dim,), (dim,), (shape.head_dim,), (shape.head_dim,)], ends


def _numbers(shapes: Shapes, shard_size: int = 1, index: int = 0) -> int:
    """Numbers of these tensors in shard `index` of `shard_size`, split by rows as torch.chunk does."""
    each = [-(-rows // shard_size) for rows, *_ in shapes]
    return sum(
        max(0, min(rows - index * span, span)) * math.prod(columns)
        for (rows, *columns), span in zip(shapes, each, strict=True)
    )


def parameters(shape: Model, vocab_size: int) -> int:
    """Number of trainable parameters of a resolved shape; tied embeddings count once."""
    matrices, vectors, ends = tensors(shape, vocab_size)
    return shape.layers * _numbers(matrices + vectors) + _numbers(ends)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. All are fp32; weights are cast to a lower precision as they are used."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def memory(shape: Model, vocab_size: int, *, muon: bool, shard_size: int = 1, index: int = 0) -> Memory:
    """Memory of process `index` of `shard_size`; Muon keeps one moment of each block matrix, AdamW two."""
    matrices, vectors, ends = tensors(shape, vocab_size)
    of_matrices = shape.layers * _numbers(matrices, shard_size, index)
    rest = shape.layers * _numbers(vectors, shard_size, index) + _numbers(ends, shard_size, index)
    weights = 4 * (of_matrices + rest)
    return Memory(weights, weights, 4 * ((1 if muon else 2) * of_matrices + 2 * rest))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per step, averaged over ranks."""

    shards: int  # to the ranks that share its replica
    replicas: int  # to the ranks that hold the same rows

    @property
    def total(self) -> int:
        return self.shards + self.replicas


def traffic(
    shape: Model,
    vocab_size: int,
    *,
    muon: bool,
    shard_size: int = 1,
    replica_size: int = 1,
    micro_batches: int = 1,
    gathered: int = 4,
    orthogonalised: int = 4,
    exact: bool = False,
) -> Traffic:
    """Traffic of gathering weights, summing gradients and Muon; `gathered` and `orthogonalised` are bytes per number.

    Each micro-batch gathers blocks in its forward and its backward pass, gathers the other tensors once, and
    reduce-scatters gradients. Replicas sum gradients once per step, or with `exact` once per micro-batch.
    """
    matrices, vectors, ends = tensors(shape, vocab_size)
    # Sizes of the first shard, as the others are padded to it.
    block, rest = shape.layers * _numbers(matrices + vectors, shard_size), _numbers(ends, shard_size)
    updates = shape.layers * _numbers(matrices) * orthogonalised if muon else 0
    rows = [shape[0] for shape in (matrices + vectors) * shape.layers + ends]
    sums = micro_batches if exact else 1
    within = (shard_size - 1) * (
        micro_batches * (2 * block * gathered + rest * 4 + (block + rest) * 4)
        + 8 * sum(-(-each // shard_size) for each in rows)  # the gradient norm: one fp64 per row
    ) + 2 * updates * (shard_size - 1) // shard_size**2
    between = 2 * sums * (block + rest) * 4 * (replica_size - 1) // replica_size
    if shard_size == 1:  # each owner broadcasts its updates
        between += updates * (replica_size - 1) // replica_size
    return Traffic(within, between)


def size(number: float) -> str:
    """Bytes in readable form: 4.59 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def flops_per_token(shape: Model, vocab_size: int) -> int:
    """FLOPs of forward and backward per token: 6 per weight of a matrix product, 6 T H E per layer for attention."""
    multiplied = parameters(shape, vocab_size) - (0 if shape.tied else vocab_size * shape.dim)
    return 6 * multiplied + 6 * shape.layers * shape.context * shape.heads * shape.head_dim
