"""Sums of gradients over all ranks, overlapped with the backward pass, bucket by bucket.

Each rank fills its buckets in the same order and sums them in that order. How gradients are divided into buckets and
pieces does not touch their bits: every number is summed alone, in canonical order (sharding.py).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llm.distributed.coordinator import HUNG
from llm.distributed.sharding import all_reduce, gather_chunks, sum_chunk
from llm.distributed.threads import compute_alone

BUCKET_MB = {"cpu": 1, "cuda": 25}  # the smaller, the sooner the first is sent; each takes two exchanges
PIECE = 1 << 18  # numbers: while the sums of one are gathered, the next one is summed

Result = TypeVar("Result")


class Lane:
    """A thread that runs exchanges in order, and none after a failure: peers would pair it with the failed one."""

    def __init__(self) -> None:
        self.thread, self.failed = ThreadPoolExecutor(1, "exchange", compute_alone), False

    def submit(self, act: Callable[[], Result]) -> Future[Result]:
        return self.thread.submit(self._do, act)

    def _do(self, act: Callable[[], Result]) -> Result:
        if self.failed:
            raise RuntimeError("an exchange failed before")
        try:
            return act()
        except BaseException:
            self.failed = True
            raise


class Exchange:
    """Sums buckets in two threads of its own, on a GPU in a stream of its own; `finish` before a gradient is read.

    All ranks make theirs together; `on_cpu` if buckets will come from there. Each thread has a group to itself, in
    which it makes the same calls on every rank.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.summing, self.gathering = Lane(), Lane()
        self.group = dist.new_group(backend="gloo", timeout=HUNG) if on_cpu else None
        self.waits: list[Callable[[], object]] = []  # one for each sum that was started

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook. The sum comes into the bucket itself, so that DDP has nothing to wait for."""
        flat, ready = bucket.buffer(), torch.futures.Future[Tensor]()
        self.waits += map(self._start, flat.split(PIECE) if flat.is_cpu else [flat])
        ready.set_result(flat)
        return ready

    def _start(self, flat: Tensor) -> Callable[[], object]:
        if flat.is_cpu:
            chunk = self.summing.submit(partial(sum_chunk, flat))
            return self.gathering.submit(lambda: gather_chunks(flat, chunk.result(), self.group)).result
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            all_reduce(flat)
        return partial(here.wait_stream, self.stream)

    def finish(self) -> None:
        """Wait for the sums. Raises the error of one that failed, as when a peer is gone."""
        waits, self.waits = self.waits, []
        for wait in waits:
            wait()
