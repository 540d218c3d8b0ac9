"""The first processes of several machines, which prepare a text together over a gloo group of their own."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from llm.base.errors import LLMError, as_llm_error
from llm.distributed.coordinator import PATIENCE, Coordinator, Followed
from llm.distributed.process import place, rank, world


class Team:
    """All its processes make the same exchanges in the same order. As a context it ends them: if one fails, all do."""

    def __init__(self, coordinator: Coordinator, ranks: list[int], group: Any, writes: bool) -> None:
        self.ranks, self.rank = ranks, ranks.index(rank())
        self.writes = writes  # whether this process writes to the cache for all that share it
        self._coordinator, self._group = coordinator, group
        self._rounds, self._ended = 0, False

    def exchange(self, part: bytes) -> list[bytes]:
        """Every process's part, in the order of `ranks`. GroupError if one of them has failed or is gone."""
        sizes = self._meet(0, len(part))
        box = torch.zeros(max(sizes), dtype=torch.uint8)
        if part:
            box[: len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        found = self._all_gather(box) if len(box) else [box] * len(sizes)
        return [each[:size].numpy().tobytes() for each, size in zip(found, sizes, strict=True)]

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = 0
        if isinstance(error, LLMError | OSError):
            known = as_llm_error(error)
            status = known.status if known else 1
        elif error is not None:
            return  # the process ends, and the others hear of that
        if not self._ended:
            with suppress(Followed):  # another has failed, of which the error barrier tells
                self._meet(status, 0)
        if error is None:
            self._coordinator.forget_progress()

    def _meet(self, status: int, size: int) -> list[int]:
        """The sizes of all parts. Followed with the largest status that is not 0."""
        self._rounds += 1
        found = self._all_gather(torch.tensor([status, size], dtype=torch.int64), f"round {self._rounds} of preparing")
        if failed := max(int(each[0]) for each in found):
            self._ended = True
            raise Followed(failed)
        return [int(each[1]) for each in found]

    def _all_gather(self, box: torch.Tensor, after: str = "") -> list[torch.Tensor]:
        found = [torch.empty_like(box) for _ in self.ranks]
        try:
            if after:
                self._coordinator.kv_store.set(str(rank()), after)
            dist.all_gather(found, box, group=self._group)
        except RuntimeError as error:
            self._ended = True
            raise self._coordinator.blamed(error, self.ranks) from error
        return found


def meet(coordinator: Coordinator, cache: Path) -> Team | None:
    """The team, on the first process of each of several machines; elsewhere None. Every rank calls this."""
    if place().local_world == world():
        return None
    leaders = coordinator.leaders()
    group = dist.new_group(leaders, backend="gloo", timeout=PATIENCE)
    sharers = coordinator.sharers(cache, needed=False)
    if rank() not in leaders:
        return None
    return Team(coordinator, leaders, group, rank() not in sharers or sharers[0] == rank())
