"""One optimizer update: gradients summed over micro-batches and ranks, clipped, applied unless they are not finite."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llm.base.constants import IGNORED
from llm.data.batches import Batch
from llm.distributed import process, sharding
from llm.distributed.exchange import Exchange
from llm.distributed.pairwise_sum import PairwiseSum
from llm.distributed.sharding import LocalShard, local_shard
from llm.optim.optimizer import gradient_norm, wide
from llm.training.context import RunContext, TrainState

FP16_SCALE, FP16_GROWTH_STEPS = 65536.0, 2000
FP16_LEAST, FP16_MOST = 1.0, 2.0**60  # of the scale; at 1 it is the gradient itself that fp16 cannot hold


class GradientStep:
    """Does updates of `state`. `wrapped` is the model as DDP or FSDP2 runs it."""

    def __init__(self, context: RunContext, state: TrainState, wrapped: Any) -> None:
        self.context, self.state, self.wrapped = context, state, wrapped
        exchanges = process.world() > 1 and not context.sharding.sharded
        self.exchange = Exchange(on_cpu=exchanges and context.device.type == "cpu")
        if exchanges:
            wrapped.register_comm_hook(None, self.exchange.hook)
        self.finite_flags: list[Tensor] = []  # one for each update since the monitor last read them
        self.diverged = torch.zeros((), dtype=torch.bool, device=context.device)

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Leave the group's sum of scale x loss / tokens_per_step in every .grad.

        Returns the sum of the losses (nats) and the number of targets: (2,) of fp64.
        """
        exact, total, counted = self.context.settings.exact, PairwiseSum(), []
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            if index == 0 or exact:
                self.state.model.zero_grad(set_to_none=True)
            loss = self._backward(batch, exchange=last or exact)
            counted.append(torch.stack([loss, (batch.targets != IGNORED).sum()]).to(wide(self.context.device)))
            if last or exact:
                self.context.sharding.sum_replicas([shard.local for shard in self._gradients()])
            if exact:
                total.add([shard.local.clone() for shard in self._gradients()])
        if exact:
            for shard, summed in zip(self._gradients(), total.total(), strict=True):
                shard.local.copy_(summed)
        # In the order of the micro-batches' numbers, whatever the world.
        return sharding.gather(torch.stack(counted)).transpose(0, 1).flatten(0, 1).sum(0)

    def _backward(self, batch: Batch, *, exchange: bool) -> Tensor:
        """Forward and backward of one micro-batch; its loss, a sum in nats.

        DDP exchanges whole gradients once a step, beside the backward pass of the last micro-batch. Sharded gradients
        are exchanged after every one, since no rank has room for them whole.
        """
        accelerator, scale = self.context.accelerator, self.state.scale / self.context.recipe.train.tokens_per_step
        waits = not exchange and not self.context.sharding.sharded
        with accelerator.no_sync(self.wrapped) if waits else nullcontext():
            with accelerator.autocast():
                loss: Tensor = self.wrapped(*batch.inputs)
            (loss * scale).backward()
        self.exchange.finish()
        return loss.detach()

    def apply(self, sums: Tensor, lr_factor: float) -> tuple[Tensor, Tensor]:
        """Update the weights by the gradients that `accumulate` left.

        Returns the mean loss (nats a token) and the gradient's norm, both of the whole group and on the device.
        """
        train, fp16 = self.context.recipe.train, self.context.settings.precision == "fp16"
        loss, tokens = sums
        # Gradients were summed as if every target counted; this makes them the mean over those that do.
        scale = train.tokens_per_step / tokens / self.state.scale
        norm = gradient_norm(self._gradients(), self.context.sharding) * scale
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        # fp16's scale answers an overflow of the gradient, which is no event; a loss that is not finite always is.
        flag = torch.isfinite(loss) if fp16 else finite
        self.finite_flags.append(flag)
        if train.on_nonfinite == "stop":
            self.diverged |= ~flag
        if train.clip:
            scale = scale * (train.clip / (norm + 1e-6)).clamp(max=1.0)
        self.state.optimizer.step(self.state.step, lr_factor, scale.float(), finite & ~self.diverged)
        if fp16:
            rescale(self.state, finite)
        return loss / tokens, norm

    def _gradients(self) -> list[LocalShard]:
        return [local_shard(p.grad) for p in self.state.model.parameters() if p.grad is not None]


def rescale(state: TrainState, finite: Tensor) -> None:
    """Halve fp16's scale after an overflow, double it after FP16_GROWTH_STEPS steps without; all on the device."""
    good_steps = torch.where(finite, state.good_steps + 1, 0)
    grown = good_steps >= FP16_GROWTH_STEPS
    doubled = (state.scale * 2).clamp(max=FP16_MOST)
    state.scale = torch.where(finite, torch.where(grown, doubled, state.scale), state.scale / 2)
    state.good_steps = torch.where(grown, 0, good_steps)
