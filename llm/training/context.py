"""What the parts of a trainer share: the run, which never changes, and its state, which every step changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llm.config.resolving import skipped
from llm.config.schema import Recipe
from llm.data.batches import BatchLoader
from llm.data.shards import Shards
from llm.data.shuffle import WindowShuffle
from llm.data.tokenizer import Tokenizer
from llm.distributed import process
from llm.distributed.coordinator import Coordinator
from llm.distributed.environment import RuntimeSettings
from llm.distributed.sharding import LocalShard, Sharding, local_shard
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer


@dataclass(frozen=True)
class Parts:
    """A caller's own parts instead of ours; llm/api.py says what each must do. The manifest names those given."""

    model: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None

    def names(self) -> dict[str, str]:
        given = {name: part for name, part in vars(self).items() if part is not None}
        return {name: f"{part.__module__}.{part.__qualname__}" for name, part in given.items()}


@dataclass(frozen=True)
class RunContext:
    """One run in this process. `recipe` has its length in steps; `settings` are what `auto` came to."""

    recipe: Recipe
    settings: RuntimeSettings
    tokenizer: Tokenizer
    shards: Shards
    accelerator: Accelerator
    coordinator: Coordinator
    sharding: Sharding
    folder: Path
    parts: Parts = field(default_factory=Parts)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @cached_property
    def order(self) -> WindowShuffle:
        return WindowShuffle(self.recipe.seed, self.shards.train.tokens, self.recipe.model.context)

    def loader(self, micro_batch: int) -> BatchLoader:
        """This rank's training batches in micro-batches of this many windows."""
        windows, skip = self.recipe.windows_per_step, skipped(self.recipe)
        rank, world = process.rank(), process.world()
        return BatchLoader(self.shards.train, self.order, windows, micro_batch, rank, world, skip)

    def epochs_seen(self, step: int) -> float:
        return step * self.recipe.windows_per_step / self.order.windows


@dataclass
class TrainState:
    """Everything that training changes and a checkpoint saves. `step` updates are done; batch `step` is the next."""

    model: Transformer
    optimizer: Optimizer
    scale: Tensor  # fp16's loss scale; 1 in other precisions
    good_steps: Tensor  # since the scale last changed
    step: int = 0

    def weights(self) -> dict[str, LocalShard]:
        return {name: local_shard(p) for name, p in self.model.named_parameters()}
