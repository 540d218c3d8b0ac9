"""Faults, planted into a child of `llm.training.proof`, each of which real trainers have had."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.data import batches
from llm.data.shards import Split
from llm.distributed import exchange, sharding
from llm.distributed.sharding import LocalShard
from llm.model import transformer
from llm.optim import optimizer
from llm.run_folder import checkpoint, tensor_files
from llm.training import length
from llm.training.step import GradientStep

STARTED = {"steps": 0}  # updates of this process: state that no checkpoint knows of


def _resumed() -> bool:
    return any(Path("runs").glob(f"*/{checkpoint.folder_of(Path(), 0).parent.name}/step-*"))


def unseeded_generator() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    transformer.dropout = lambda x, windows, *, seed, site, rate: F.dropout(x, rate)


def mask_by_row() -> None:
    real = transformer.dropout
    transformer.dropout = lambda x, windows, **site: real(x, torch.arange(len(windows)), **site)


def order_by_worker() -> None:
    real = batches.BatchLoader.positions
    batches.BatchLoader.positions = lambda self, step: [each + 3 * self.rank for each in real(self, step)]


def order_begins_anew() -> None:
    real = batches.BatchLoader.positions

    def positions(self: batches.BatchLoader, step: int) -> list[np.ndarray]:
        STARTED["steps"] += 1
        return real(self, STARTED["steps"])

    batches.BatchLoader.positions = positions


def rate_by_counter() -> None:
    real = length.lr_factor

    def lr_factor(step: int, **of_run: Any) -> float:
        STARTED["steps"] += 1
        return real(STARTED["steps"], **of_run)

    length.lr_factor = lr_factor


def rate_one_step_off_after_resume() -> None:
    real, off = length.lr_factor, int(_resumed())
    length.lr_factor = lambda step, **of_run: real(step + off, **of_run)


def lost_moments() -> None:
    real = tensor_files.load_tensors

    def load_tensors(path: Path, into: dict[str, LocalShard]) -> None:
        if path.name != checkpoint.MOMENTS:
            real(path, into)

    tensor_files.load_tensors = load_tensors


def rounded_moments() -> None:
    real = tensor_files.load_tensors

    def load_tensors(path: Path, into: dict[str, LocalShard]) -> None:
        real(path, into)
        for rows in into.values():
            if path.name == checkpoint.MOMENTS:
                rows.local.copy_(rows.local.bfloat16())

    tensor_files.load_tensors = load_tensors


def bias_correction_by_counter() -> None:
    real = optimizer.Optimizer._adamw

    def adamw(self: Any, named: Any, step: int, *others: Any) -> None:
        STARTED["steps"] += 1
        real(self, named, STARTED["steps"], *others)

    optimizer.Optimizer._adamw = adamw


def local_token_count() -> None:
    real = GradientStep.accumulate

    def accumulate(self: GradientStep, batches: list[batches.Batch]) -> Tensor:
        loss, tokens = real(self, batches)
        return torch.stack([loss, tokens / max(1, sharding.size())])

    GradientStep.accumulate = accumulate


def gradients_never_cleared() -> None:
    transformer.Transformer.zero_grad = lambda self, set_to_none=True: None


def gradients_not_exchanged() -> None:
    sharding.all_reduce = lambda flat, group=None: flat
    exchange.gather_chunks = lambda flat, chunk, group=None: flat


def stale_shard() -> None:
    real = Split.read
    if _resumed():
        Split.read = lambda self, start, stop: np.roll(real(self, start, stop), 1)


def last_micro_batch_only() -> None:
    real = GradientStep.accumulate
    GradientStep.accumulate = lambda self, batches: real(self, batches[-1:])


FAULTS = [
    unseeded_generator, mask_by_row, order_by_worker, order_begins_anew, rate_by_counter, rate_one_step_off_after_resume,
    lost_moments, rounded_moments, bias_correction_by_counter, local_token_count, gradients_never_cleared,
    gradients_not_exchanged, stale_shard, last_micro_batch_only]  # fmt: skip
