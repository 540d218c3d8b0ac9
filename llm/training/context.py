"""The parts that a trainer's modules share: `RunContext`, which is fixed, and `TrainState`, which each step changes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from llm.config.resolving import skipped
from llm.config.schema import Recipe
from llm.data.batches import BatchLoader
from llm.data.mixture import MixedShuffle, Order, order_of
from llm.data.shards import AnyShards
from llm.data.tokenizer import Tokenizer
from llm.distributed import process
from llm.distributed.coordinator import Coordinator
from llm.distributed.environment import RuntimeSettings
from llm.distributed.sharding import LocalShard, Sharding, local_shard
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer


@dataclass(frozen=True)
class Parts:
    """A caller's own parts; llm.api.train says what each must do. The manifest names those given."""

    model: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None
    documents: Callable[[], Iterable[str | bytes]] | None = None
    on_log: Callable[[dict[str, Any]], None] | None = None

    def names(self) -> dict[str, str]:
        return {name: qualified_name(part) for name, part in vars(self).items() if part is not None}


def qualified_name(part: Any) -> str:
    """module.NAME of a function or class; of a callable object that of its class, of a partial that of its function."""
    part = part.func if isinstance(part, partial) else part
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class RunContext:
    """One run in this process. `recipe` has its length in steps; `settings` are what `auto` came to."""

    recipe: Recipe
    settings: RuntimeSettings
    tokenizer: Tokenizer
    shards: AnyShards
    accelerator: Accelerator
    coordinator: Coordinator
    sharding: Sharding
    folder: Path
    parts: Parts = field(default_factory=Parts)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def orthogonalise_in(self) -> torch.dtype:
        return torch.float32 if self.settings.precision == "fp32" else torch.bfloat16

    @property
    def shares_with_prefixes(self) -> bool:
        """Whether embeddings start with a bias and move with those of their prefixes: tied ones beside Muon.

        Not with a caller's model or optimizer, nor after `model.from`, whose embeddings are trained already. A run
        that goes on from a checkpoint counts its updates too, and shares in as many of them.
        """
        recipe, own = self.recipe, self.parts.model is not None or self.parts.optimizer is not None
        return recipe.train.optimizer == "muon" and recipe.model.tied and not recipe.model.from_ and not own

    @cached_property
    def order(self) -> Order:
        return order_of(self.recipe, self.shards)

    def loader(self, micro_batch: int) -> BatchLoader:
        """This rank's training batches in micro-batches of this many windows."""
        windows, skip = self.recipe.windows_per_step, skipped(self.recipe.train.skip)
        rank, world = process.rank(), process.world()
        return BatchLoader(self.shards.train, self.order, windows, micro_batch, rank, world, skip)

    def windows_read(self, step: int) -> dict[str, int]:
        """The windows of each source that the run, with those it goes on from, has read after `step` updates."""
        if not isinstance(self.order, MixedShuffle):
            return {"": step * self.recipe.windows_per_step}
        read = sum(
            self.order.read_before(high) - self.order.read_before(low) for low, high in self.loader(1).read(step)
        )
        return dict(zip(self.order.sources, np.asarray(read).tolist(), strict=True))

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

    @property
    def parameters(self) -> int:
        """Number of trainable parameters, of all shards together."""
        return sum(math.prod(shard.shape) for shard in self.weights().values())
