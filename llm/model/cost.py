"""Costs of a model by formula: parameters, FLOPs per token, bytes in memory and bytes over the network.

It never imports torch: `python -m llm.plan` answers at once.
"""

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from llm.base.constants import CACHED_NUMBERS, CHUNK_NUMBERS, STACKED, STACKED_NUMBERS
from llm.config.schema import Model, Train

Shapes: TypeAlias = list[tuple[int, ...]]

# Bytes that a block saves per token for its backward pass, for each feature of the residual stream, of queries and
# keys or values, and inside the MLP; by device and by bytes of a number in the products. On a CPU `fused.py` computes
# a block; autocast on a GPU casts the input of each product anew.
SAVED = {("cpu", 4): (8, 16, 12), ("cpu", 2): (4, 8, 6), ("cuda", 4): (16, 12, 16), ("cuda", 2): (18, 6, 8)}
RECOMPUTED = {"cpu": 4, "cuda": 2}  # temporary tensors of the MLP's width beside a recomputed block, measured


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
class StepMemory:
    """Bytes of live tensors in a step of one process, without what libraries and the CUDA context take.

    `peak` may be less than the sum of the parts, which are not all alive at once.
    """

    weights: int
    gradients: int
    moments: int
    activations: int  # kept for the backward pass, with weights cast to 16 bits
    logits: int  # chunks alive at once, and the gradients that the loss computes with them
    peak: int


def step_memory(
    shape: Model,
    vocab_size: int,
    windows: int,
    *,
    muon: bool,
    micro_batches: int = 2,
    half: bool = False,
    cuda: bool = False,
    recompute: bool = False,
) -> StepMemory:
    """Memory of a step in `micro_batches` of `windows` windows; `half`: bf16 or fp16 instead of fp32."""
    held, device = memory(shape, vocab_size, muon=muon), "cuda" if cuda else "cpu"
    matrices, _, outside = tensors(shape, vocab_size)
    tokens, dim, number = windows * shape.context, shape.dim, 2 if half else 4
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stream, heads, mlp = SAVED[device, number]
    sums = 4 * (2 + 2 * shape.heads + shape.kv_heads)  # of the norms and of attention's softmax
    masks = 2 * dim * number if shape.dropout else 0
    block = tokens * (stream * dim + heads * (queries + keys) + mlp * shape.ffn_dim + sums + masks)
    kept = matrices if cuda else [matrices[3], matrices[6]]  # those whose 16 bits autocast keeps for the backward pass
    cast = shape.layers * _numbers(kept) * 2 if half else 0
    ends = tokens * dim * ((4 if cuda else 8) + (4 if shape.dropout else 0)) + 8 * shape.context * shape.head_dim
    saved = shape.layers * (tokens * dim * 4 if recompute else block) + ends

    head = 4 * vocab_size * dim  # bytes of a gradient of the output matrix
    chunks = max(1, -(-tokens // max(1, CHUNK_NUMBERS[device] // vocab_size)))
    chunk = -(-tokens // chunks) * vocab_size  # numbers
    # In place on a CPU, but for a block of rows in fp32; on a GPU in their type and in fp32, with their gradient.
    alive = (8 if half and cuda else number) + (number if chunks > 1 else 0)  # bytes
    wide = 4 * min(chunk, CACHED_NUMBERS) + head // 2 if half and not cuda else 0  # and the head's gradient in 16 bits
    logits = chunk * alive + wide + head + 2 * tokens * dim * number + (head // 2 if half else 0)

    own = 4 * _numbers(matrices)  # of one block
    # That one is recomputed, going backward.
    beside = block + tokens * (dim * 4 + RECOMPUTED[device] * shape.ffn_dim * number)
    earlier = held.gradients if micro_batches > 1 else 0  # of the micro-batches before
    peak = max(
        earlier + saved + cast + logits,
        earlier + saved + (0 if recompute else cast) + 2 * head + 2 * tokens * dim * number,
        held.gradients + head * (2 if micro_batches > 1 else 1),
        max(earlier + saved - ends + head, held.gradients - own) + beside if recompute else 0,
        _update(shape, matrices, outside, held, muon=muon, number=number, device=device),
    )
    return StepMemory(
        held.weights, held.gradients, held.moments, saved + cast, logits, held.weights + held.moments + peak
    )


def _update(shape: Model, matrices: Shapes, ends: Shapes, held: Memory, *, muon: bool, number: int, device: str) -> int:
    """Most bytes of gradients with what their norm, or Muon of a stack of them, takes beside; stacks as Optimizer's."""
    left = held.gradients
    peak = left + (8 * max(map(math.prod, matrices + ends)) if device == "cpu" else 0)  # the norm, in fp64
    for (rows, columns), same in groupby(sorted(matrices * shape.layers) if muon else []):
        alike, least = len(list(same)), min(rows, columns)
        stack = max(1, min(STACKED, STACKED_NUMBERS[device] // (rows * columns)))
        for low in range(0, alike, stack):
            count = min(stack, alike - low)
            orthogonalising = count * (3 * rows * columns + 4 * least * least) * number
            left -= count * rows * columns * 4
            peak = max(peak, left + max(orthogonalising, 3 * 4 * count * rows * columns))
    # The shared update's gradients of prefixes, their sums, and a CUDA kernel's partial sums. A CPU's norm takes more.
    shared = muon and shape.tied and not shape.from_ and device == "cuda"
    return max(peak, left + (int(3.1 * 4 * math.prod(ends[0])) if shared else 0))


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
    prefixes: bool = False,
) -> Traffic:
    """Traffic of gathering weights, summing gradients and Muon; `gathered` and `orthogonalised` are bytes per number.

    Each micro-batch gathers blocks in its forward and its backward pass, gathers the other tensors once, and
    reduce-scatters gradients. Replicas sum gradients once per step, or with `exact` once per micro-batch. With
    `prefixes` gradients and updates of the embeddings are gathered too: in the first updates (optim/optimizer.py).
    """
    matrices, vectors, ends = tensors(shape, vocab_size)
    # Sizes of the first shard, as the others are padded to it.
    block, rest = shape.layers * _numbers(matrices + vectors, shard_size), _numbers(ends, shard_size)
    updates = shape.layers * _numbers(matrices) * orthogonalised if muon else 0
    rows = [shape[0] for shape in (matrices + vectors) * shape.layers + ends]
    sums = micro_batches if exact else 1
    within = (shard_size - 1) * (
        micro_batches * (2 * block * gathered + rest * 4 + (block + rest) * 4)
        + (2 * 4 * _numbers(ends[:1], shard_size) if prefixes else 0)
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


def covered(train: Train, vocab_size: int) -> int:
    """Pieces that the training loss weighs a target against."""
    return min(train.sampled_softmax or vocab_size, vocab_size)


def shallow_steps(train: Train) -> int:
    """Steps that train half of the blocks: train.shallow, but at most half of a run whose length is known."""
    return min(train.shallow, train.steps // 2) if train.steps else train.shallow


def run_flops(shape: Model, train: Train, vocab_size: int) -> int:
    """FLOPs of all steps of a run whose length in steps is known."""
    pieces, shallow = covered(train, vocab_size), shallow_steps(train)
    half = replace(shape, layers=-(-shape.layers // 2))
    steps = shallow * flops_per_token(half, pieces) + (train.steps - shallow) * flops_per_token(shape, pieces)
    return steps * train.tokens_per_step


def flops_per_token(shape: Model, vocab_size: int) -> int:
    """FLOPs of forward and backward per token: 6 per weight of a matrix product, 6 T H E per layer for attention."""
    multiplied = parameters(shape, vocab_size) - (0 if shape.tied else vocab_size * shape.dim)
    return 6 * multiplied + 6 * shape.layers * shape.context * shape.heads * shape.head_dim
