"""What a model costs, by formula: parameters, operations a token, bytes on a device and bytes over a link."""

import math
from dataclasses import dataclass

from llm.config.schema import Model


def parameters(shape: Model, vocab_size: int) -> int:
    """Trainable numbers of a resolved shape; tied embeddings count once."""
    attention = shape.dim * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 2 * shape.head_dim
    block = attention + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
    return shape.layers * block + shape.dim + vocab_size * shape.dim * (1 if shape.tied else 2)


@dataclass(frozen=True)
class Tensors:
    """Shapes of one block's matrices and vectors, and of what stands outside of the blocks."""

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
    """How many numbers of these tensors process `index` of `shard_size` holds, rows dealt as torch.chunk cuts."""
    each = [-(-rows // shard_size) for rows, *_ in shapes]
    return sum(
        max(0, min(rows - index * span, span)) * math.prod(columns)
        for (rows, *columns), span in zip(shapes, each, strict=True)
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, all of fp32: what precision multiplies in is made of the weights as it is needed."""

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
    """Bytes that a process sends a step, the mean over the group."""

    shards: int  # to those among whom rows are dealt: all (full), its node's (hybrid), none (none)
    replicas: int  # to those that hold the same rows

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
    """What sums, gathering and Muon send; `gathered` and `orthogonalised` are bytes a number.

    Blocks are gathered forward and backward at every micro-batch, what is outside of them once; sharded gradients are
    dealt at every micro-batch, those of replicas summed once a step (`exact`: at every one).
    """
    of = tensors(shape, vocab_size)
    block = shape.layers * _numbers(of.matrices + of.vectors, shard_size)  # of the first part: others are padded to it
    ends = _numbers(of.ends, shard_size)
    matrices = shape.layers * _numbers(of.matrices) if muon else 0
    rows = [shape[0] for shape in (of.matrices + of.vectors) * shape.layers + of.ends]
    sums = micro_batches if exact else 1
    within = (shard_size - 1) * (
        micro_batches * (2 * block * gathered + ends * 4 + (block + ends) * 4)
        + 8 * sum(-(-each // shard_size) for each in rows)  # the norm: one fp64 a row
    ) + 2 * matrices * orthogonalised * (shard_size - 1) // shard_size**2
    between = 2 * sums * (block + ends) * 4 * (replica_size - 1) // replica_size
    if shard_size == 1:  # each owner broadcasts its updates
        between += matrices * orthogonalised * (replica_size - 1) // replica_size
    return Traffic(within, between)


def size(number: float) -> str:
    """Bytes for people: 4.59 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def flops_per_token(shape: Model, vocab_size: int) -> int:
    """Operations of forward and backward for a token of training.

    6 a weight that is multiplied, and causal attention's 6 T H E a layer.
    """
    multiplied = parameters(shape, vocab_size) - (0 if shape.tied else vocab_size * shape.dim)
    return 6 * multiplied + 6 * shape.layers * shape.context * shape.heads * shape.head_dim
