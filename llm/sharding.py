"""Sums over processes in one canonical order, and whole tensors out of slices and back.

A library's all-reduce adds in an order of its own, which may change from one step to the next; ours exchanges parts, adds them pairwise in
the order of the ranks and gathers them, with a ring's traffic.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The name differs between the torch versions that we support.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Sum of `parts`, added pairwise in their order: ((a + b) + (c + d)) + ..."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def all_reduce(flat: Tensor) -> Tensor:
    """Sum of the one-dimensional `flat` over all processes, in place and in canonical order."""
    if not dist.is_initialized() or (world := dist.get_world_size()) == 1:
        return flat
    padded = F.pad(flat, (0, -flat.numel() % world))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    _all_gather(padded, tree_sum(list(received.view(world, -1))))
    return flat.copy_(padded[: flat.numel()])


def gather(values: Tensor) -> Tensor:
    """(world, ...): `values` of every process, in the order of the ranks."""
    if not dist.is_initialized():
        return values[None]
    gathered = torch.empty((dist.get_world_size() * values.numel(),), dtype=values.dtype, device=values.device)
    _all_gather(gathered, values.flatten())
    return gathered.view(-1, *values.shape)


def canonical_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the gradients of all processes, summed (not averaged) in canonical order."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(all_reduce(bucket.buffer()))
    return future
