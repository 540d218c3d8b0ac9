"""Sharding of parameters by rows, and sums over ranks in one canonical order.

A library's all-reduce adds in an unspecified order that may change from step to step. Ours exchanges chunks, adds them
pairwise in rank order and gathers the sums, with the traffic of a ring. Sharding is torch's fully_shard on each block
and the root, called directly because accelerate supports it on accelerators only. fully_shard and DTensor take a second
to import, so they are imported only where something is sharded.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llm.distributed.process import place

Module = TypeVar("Module", bound=nn.Module)
Group = dist.ProcessGroup | None  # None: all processes, or the only one

EXCHANGED = {"cpu": 1 << 20, "cuda": 1 << 24}  # numbers exchanged at once, which bounds the extra memory of a sum

# The name differs between the torch versions that we support.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# ------------------------------------------------------------------------------------------------- canonical sums


def size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Sum of `parts`, added pairwise in their order: ((a + b) + (c + d)) + ..."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def reduce_scatter(output: Tensor, flat: Tensor, group: Group = None) -> None:
    """Write this rank's chunk of the sum of `flat` over the group to `output`, added in canonical order."""
    parts = flat.view(size(group), -1)
    each = max(1, EXCHANGED["cuda" if flat.is_cuda else "cpu"] // len(parts))
    for low in range(0, len(output), each):
        piece = parts[:, low : low + each].contiguous()
        received = torch.empty_like(piece)
        dist.all_to_all_single(received, piece, group=group)
        output[low : low + each] = tree_sum(list(received))


def all_reduce(flat: Tensor, group: Group = None) -> Tensor:
    """Sum of the one-dimensional `flat` over the group, in place and in canonical order."""
    return flat if size(group) == 1 else gather_chunks(flat, sum_chunk(flat, group), group)


def sum_chunk(flat: Tensor, group: Group = None) -> Tensor:
    """This rank's chunk of the sum of the one-dimensional `flat`; the last ones are padded with zeros."""
    missing = -flat.numel() % size(group)
    padded = F.pad(flat, (0, missing)) if missing else flat
    chunk = torch.empty(padded.numel() // size(group), dtype=flat.dtype, device=flat.device)
    reduce_scatter(chunk, padded, group)
    return chunk


def gather_chunks(flat: Tensor, chunk: Tensor, group: Group = None) -> Tensor:
    """Fill `flat` with the chunks of all ranks."""
    if flat.numel() % size(group) == 0:
        _all_gather(flat, chunk, group=group)
        return flat
    return flat.copy_(gather(chunk, group).flatten()[: flat.numel()])


def gather(values: Tensor, group: Group = None) -> Tensor:
    """Stack the `values` of all ranks of the group, in rank order: (ranks, ...)."""
    if size(group) == 1:
        return values[None]
    gathered = torch.empty(size(group) * values.numel(), dtype=values.dtype, device=values.device)
    _all_gather(gathered, values.flatten(), group=group)
    return gathered.view(-1, *values.shape)


class CanonicalReduceScatter:
    """The same for fully_shard, by torch's protocol for a custom reduce-scatter."""

    def allocate(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        reduce_scatter(output_tensor, input_tensor, group)
        if input_tensor.device.type == "cpu":  # no longer read, but FSDP keeps it until the next block's
            input_tensor.untyped_storage().resize_(0)


# ------------------------------------------------------------------------------------------------- who holds what


@dataclass(frozen=True)
class LocalShard:
    """This rank's shard of a tensor of `shape`: `local` holds its rows from `low` on."""

    local: Tensor
    shape: tuple[int, ...]
    low: int

    @property
    def flat(self) -> Tensor:
        """`local` as a matrix, (rows, numbers per row); there may be no rows."""
        return self.local.reshape(len(self.local) if self.shape else 1, math.prod(self.shape[1:]))

    def like(self, local: Tensor) -> "LocalShard":
        """`local` as the same rows of another tensor of this shape."""
        return LocalShard(local, self.shape, self.low)


def bounds(rows: int, shard_size: int, index: int) -> tuple[int, int]:
    """First row of shard `index` of `shard_size`, and the row after its last; split as torch.chunk does."""
    each = -(-rows // shard_size)
    return min(index * each, rows), min(index * each + each, rows)


def local_shard(tensor: Tensor) -> LocalShard:
    """This rank's shard of a tensor or DTensor, with its row offset."""
    if not (hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")):  # not a DTensor
        return LocalShard(tensor.detach(), tuple(tensor.shape), 0)
    low, _ = bounds(tensor.shape[0], tensor.device_mesh.size(), tensor.device_mesh.get_local_rank())
    with torch.no_grad():
        return LocalShard(tensor.to_local(), tuple(tensor.shape), low)


class Sharding:
    """Rows of each tensor sharded over all ranks (full), within each machine and replicated across (hybrid), or whole
    on each rank (none). `shard_size` ranks share a replica of the model; there are `replica_size` replicas."""

    MIN_PROCESSES = 2  # fewest ranks to shard over; tests set 1

    def __init__(
        self,
        mode: Literal["none", "full", "hybrid"] = "none",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shard_group: Group = None  # ranks that share one replica of the model
        self.replica_group: Group = None  # ranks that hold the same rows as this one
        self.shard_size, self.replica_size, self.index = 1, size(), 0
        self.dtype, self.sharded = dtype, False
        if mode != "none" and size() >= self.MIN_PROCESSES:
            self.shard_size = size() if mode == "full" else place().local_world
            self.replica_size = size() // self.shard_size
            assert device is not None
            from torch.distributed.device_mesh import init_device_mesh

            sizes = self.replica_size, self.shard_size
            mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "shards"))
            self.mesh = mesh["shards"]
            self.shard_group, self.replica_group = mesh.get_group("shards"), mesh.get_group("replicas")
            self.index = mesh.get_local_rank("shards")
            self.sharded = self.shard_size >= self.MIN_PROCESSES
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.first_replica = rank < self.shard_size  # whether this rank belongs to it; it writes checkpoints

    def shard_module(self, module: Module, root: bool = False) -> Module:
        """Shard the parameters of `module` that are not sharded yet; call it on the root after all blocks.

        Blocks are gathered in the compute type, as autocast would cast them; gradients are summed in fp32.
        """
        if not self.sharded:
            return module
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        dtype = None if root else self.dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=self.mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(CanonicalReduceScatter())
        module.set_gradient_divide_factor(1.0)
        if self.mesh.device_type == "cpu":  # gathering a block ahead of its turn gains nothing
            module.set_modules_to_backward_prefetch([module])
        if root:
            module.set_force_sum_reduction_for_comms(True)
            register_fsdp_forward_method(module, "logits")
        return module

    def reshard(self, model: nn.Module) -> None:
        """Reshard parameters left gathered by a forward without backward."""
        if self.sharded:
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(model, FSDPModule)
            model.reshard()

    def sum_replicas(self, gradients: list[Tensor]) -> None:
        """Sum gradients over replicas (hybrid only: otherwise the backward pass has done it)."""
        if self.sharded and self.replica_size > 1:
            flat = all_reduce(torch.cat([g.flatten() for g in gradients]), self.replica_group)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def gather_whole(self, rows: LocalShard) -> Tensor:
        """Gather the whole tensor from all shards; every rank must call this."""
        if not self.sharded:
            return rows.local
        each = bounds(rows.shape[0], self.shard_size, 0)[1]
        padded = rows.local.new_zeros((each, *rows.shape[1:]))
        padded[: len(rows.local)] = rows.local
        return gather(padded, self.shard_group).flatten(0, 1)[: rows.shape[0]]
