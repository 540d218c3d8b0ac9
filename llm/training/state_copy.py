"""A copy of the state in main memory, from which a checkpoint is written while training continues."""

from functools import partial

import torch
from torch import Tensor

from llm.distributed import process
from llm.distributed.host_memory import has_room
from llm.distributed.sharding import LocalShard
from llm.run_folder.checkpoint import Draft
from llm.training.memory import within_memory


class StateCopy:
    """Copies what this rank writes into memory that is kept for the next copy (pinned where it comes from CUDA)."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] | None = None  # None: before the first copy, and where there is no room for one
        self.decided = False

    def take(self, draft: Draft) -> bool:
        """Replace the draft's tensors by copies; False where any rank is short of memory, which is decided once.

        All ranks call this together: rows that one of them writes for others are gathered here.
        """
        if not self.decided:
            self._decide(draft)
        if self.kept is None:
            return False
        draft.weights, draft.moments = (self._copies(self.kept, draft, each) for each in (draft.weights, draft.moments))
        draft.copied = True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True

    def _decide(self, draft: Draft) -> None:
        like = {name: _buffer_like(draft, shard) for each in draft.tensors.values() for name, shard in each.items()}
        size = sum(each.numel() * each.element_size() for each in like.values())
        self.decided = True
        if has_room(size, process.place().local_world if draft.shared else 1):
            self.kept = within_memory(partial(_buffers, like))
        if draft.coordinator.largest(self.kept is None):
            self.kept = None
            process.say("memory is short: the training waits while a checkpoint is written")

    @staticmethod
    def _copies(kept: dict[str, Tensor], draft: Draft, tensors: dict[str, LocalShard]) -> dict[str, LocalShard]:
        copies = {}
        for name, shard in sorted(tensors.items()):
            source = shard.local if draft.shared else draft.sharding.gather_whole(shard)
            if draft.fills:
                copy = kept[name].copy_(source, non_blocking=source.is_cuda)
                copies[name] = LocalShard(copy, shard.shape, shard.low if draft.shared else 0)
        return copies


def _buffer_like(draft: Draft, shard: LocalShard) -> Tensor:
    """A tensor without memory of the size and type of what this rank writes of `shard`."""
    shape = shard.local.shape if draft.shared else shard.shape
    return torch.empty(shape if draft.fills else (0,), dtype=shard.local.dtype, device="meta")


def _buffers(like: dict[str, Tensor]) -> dict[str, Tensor]:
    pinned = torch.cuda.is_available()
    return {name: torch.empty_like(each, device="cpu", pin_memory=pinned) for name, each in like.items()}
