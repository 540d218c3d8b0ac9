"""Costs of a model by formula: parameters, FLOPs per token, bytes in memory and bytes over the network."""

import math
from dataclasses import dataclass

from llm.config.schema import Model


@dataclass(frozen=True)
class Tensors:
    """Shapes of one block's matrices and vectors, and of the tensors outside the blocks."""

    matrices: list[tuple[int, ...]]
    vectors: list[tuple[int, ...]]
    ends: list[tuple[int, ...]]


def tensors(shape: Model, vocab_size: int) -> Tensors:
    queries, keys, dim, ffn = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.dim, shape.ffn_dim
    return Tensors(
        [(queries, dim), (keys, dim), (keys, dim), (dim, queries), (ffn, dim), (ffn, dim), (dim, ffn)],
        [(dim,), (dim,), (shape.head_dim,), (shape.head_dim,)],
        [(vocab_size, dim)] * (1 if shape.tied else 2) + [(dim,)],
    )


def _numbers(shapes: list[tuple[int, ...]], shard_size: int = 1, index: int = 0) -> int:
    """Numbers of these tensors in shard `index` of `shard_size`, split by rows as torch.chunk does."""
    each = [-(-rows // shard_size) for rows, *_ in shapes]
    return sum(
        max(0, min(rows - index * span, span)) * math.prod(columns)
        for (rows, *columns), span in zip(shapes, each, strict=True)
    )


def parameters(shape: Model, vocab_size: int) -> int:
    """Number of trainable parameters of a resolved shape; tied embeddings count once."""
    of = tensors(shape, vocab_size)
    return shape.layers * _numbers(of.matrices + of.vectors) + _numbers(of.ends)


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
    of = tensors(shape, vocab_size)
    matrices = shape.layers * _numbers(of.matrices, shard_size, index)
    rest = shape.layers * _numbers(of.vectors, shard_size, index) + _numbers(of.ends, shard_size, index)
    weights = 4 * (matrices + rest)
    return Memory(weights, weights, 4 * ((1 if muon else 2) * matrices + 2 * rest))


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
    of = tensors(shape, vocab_size)
    # Sizes of the first shard, as the others are padded to it.
    block, ends = shape.layers * _numbers(of.matrices + of.vectors, shard_size), _numbers(of.ends, shard_size)
    matrices = shape.layers * _numbers(of.matrices) if muon else 0
    rows = [shape[0] for shape in (of.matrices + of.vectors) * shape.layers + of.ends]
    sums = micro_batches if exact else 1
    within = (shard_size - 1) * (
        micro_batches * (2 * block * gathered + ends * 4 + (block + ends) * 4)
        + 8 * sum(-(-each // shard_size) for each in rows)  # the gradient norm: one fp64 per row
    ) + 2 * matrices * orthogonalised * (shard_size - 1) // shard_size**2
    between = 2 * sums * (block + ends) * 4 * (replica_size - 1) // replica_size
    if shard_size == 1:  # each owner broadcasts its updates
        between += matrices * orthogonalised * (replica_size - 1) // replica_size
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
