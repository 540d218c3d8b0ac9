"""Sums of gradients over all ranks beside the backward pass, bucket by bucket.

Each rank fills its buckets in the same order and sums them in that order. How gradients are divided into buckets does
not touch their bits: every number is summed alone, in canonical order (sharding.py).
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from llm.distributed.sharding import all_reduce
from llm.distributed.threads import compute_alone

BUCKET_MB = {"cpu": 1, "cuda": 25}  # the smaller, the sooner the first is sent; each takes two exchanges


class Exchange:
    """Sums buckets in a thread of its own, on a GPU in a stream of its own; `finish` before a gradient is read."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "exchange", compute_alone)
        self.sums: list[Future[Tensor]] = []

    def hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook. The sum comes into the bucket itself, so that DDP has nothing to wait for."""
        flat, ready = bucket.buffer(), torch.futures.Future[Tensor]()
        if self.stream is None:
            self.sums.append(self.thread.submit(all_reduce, flat))
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                all_reduce(flat)
        ready.set_result(flat)
        return ready

    def finish(self) -> None:
        """Wait for the sums. Raises the error of one that failed, as when a peer is gone."""
        sums, self.sums = self.sums, []
        for each in sums:
            each.result()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
