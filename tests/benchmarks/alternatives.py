"""What the product was measured against: constants by name, such as optimizer.MOMENTUM=0.95, and other ways of doing.

They are planted into a child of learning.py, never into the product.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.data.batches import eval_batches
from llm.distributed.sharding import local_shard
from llm.model import transformer
from llm.model.transformer import Transformer
from llm.optim import optimizer
from llm.optim.optimizer import Optimizer, Stack
from llm.training import length
from llm.training.trainer import Trainer


def plant(text: str) -> None:
    """Alter llm's modules as `text` says: MODULE.NAME=NUMBER, MODULE.TABLE.KEY=NUMBER, or functions below; by spaces."""
    for each in text.split():
        name, equals, value = each.partition("=")
        if not equals:
            ALTERNATIVES[each]()
            continue
        module, *path, last = name.split(".")
        place: Any = {"optimizer": optimizer, "transformer": transformer}[module]
        for key in path:
            place = getattr(place, key)
        numbers = [float(number) for number in value.split(",")]
        given = numbers[0] if len(numbers) == 1 else tuple(numbers)
        if isinstance(place, dict):
            place[last] = given
        else:
            setattr(place, last, given)


def _updates(change: Callable[[Optimizer, Stack, Tensor], Tensor]) -> None:
    """`change` each stack's orthogonalised update, before it is scaled."""
    real = Optimizer._orthogonalised
    Optimizer._orthogonalised = lambda self, stacks, given: [  # type: ignore[method-assign]
        change(self, stack, update.float()) for stack, update in zip(stacks, real(self, stacks, given), strict=True)
    ]


def rms_scale() -> None:
    """Updates of the size of AdamW's, 0.2 sqrt(max(rows, columns)), instead of sqrt(max(1, rows / columns))."""

    def scaled(self: Optimizer, stack: Stack, update: Tensor) -> Tensor:
        _, rows, columns = stack.shape
        return update * (0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns)))

    _updates(scaled)


def normuon() -> None:
    """NorMuon: rows of the update divided by a running root mean square, its size as a whole kept."""
    squares: dict[int, Tensor] = {}
    steps: dict[int, int] = {}

    def normed(self: Optimizer, stack: Stack, update: Tensor) -> Tensor:
        number = id(stack)
        square = update.square().mean(-1, keepdim=True)
        steps[number] = steps.get(number, 0) + 1
        running = squares.setdefault(number, torch.zeros_like(square))
        running.lerp_(square, 0.05)
        size = update.norm(dim=(1, 2), keepdim=True)
        update = update / ((running / (1 - 0.95 ** steps[number])).sqrt() + 1e-8)
        return update * (size / (update.norm(dim=(1, 2), keepdim=True) + 1e-8))

    _updates(normed)


def cautious() -> None:
    """Decay only where the update and the weight agree in sign."""
    real, now = Optimizer._muon, {"rate": 0.0}

    def muon(self: Optimizer, rate: float, *others: Any) -> None:
        decay, self.decay, now["rate"] = self.decay, 0.0, rate * self.decay
        real(self, rate, *others)
        self.decay = decay

    def decayed(self: Optimizer, stack: Stack, update: Tensor) -> Tensor:
        for p, part in zip(stack.weights, update, strict=True):
            local_shard(p).local.mul_(1 - now["rate"] * (part * local_shard(p).local > 0))
        return update

    Optimizer._muon = muon  # type: ignore[method-assign]
    _updates(decayed)


def two_polynomials() -> None:
    """Two instead of three: all of 0.05 to 1 within 22 % of 1, what is smaller stays below."""
    optimizer.POLYNOMIALS = ((6.7524, -18.351, 13.2633), (2.5379, -1.8747, 0.4413))  # type: ignore[assignment]


def four_polynomials() -> None:
    """All of 0.003 to 1 within 20 % of 1."""
    first = (8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695)
    optimizer.POLYNOMIALS = (*first, (3.5056, -2.6267, 0.5257), (2.4901, -1.8343, 0.4368))  # type: ignore[assignment]


def shared_feature() -> None:
    """At the start all embeddings have the same first feature, eight times as long as the rest: a bias for each matrix."""
    real = Transformer.initialise

    @torch.no_grad()
    def initialise(self: Transformer, seed: int) -> None:
        real(self, seed)
        embedded = self.model.embed_tokens.weight
        embedded[:, 0] = 8 * embedded[:, 1:].norm(dim=1).mean()
        self.model.norm.weight[0] = 0.0

    Transformer.initialise = initialise  # type: ignore[method-assign]


def no_nesterov() -> None:
    real = Optimizer._orthogonalised
    Optimizer._orthogonalised = lambda self, stacks, given: real(  # type: ignore[method-assign]
        self, stacks, [stack.momentum.to(each.dtype) for stack, each in zip(stacks, given, strict=True)]
    )


def momentum_warmup() -> None:
    """From 0.8 up over the first 200 steps."""
    real, full = Optimizer.step, optimizer.MOMENTUM

    def step(self: Optimizer, step: int, *others: Any) -> None:
        optimizer.MOMENTUM = 0.8 + (full - 0.8) * min(1.0, step / 200)
        real(self, step, *others)

    Optimizer.step = step  # type: ignore[method-assign]


def _shape(shape: Callable[[float], float]) -> None:
    """The fall of the rate, from 1 to 0, in another shape."""
    real = length.lr_factor

    def lr_factor(step: int, *, warmup: int, **others: Any) -> float:
        share = real(step, warmup=warmup, **others)
        return share if step < warmup else shape(share)

    length.lr_factor = lr_factor


def sqrt_decay() -> None:
    _shape(lambda share: 1 - math.sqrt(1 - share))


def cosine_decay() -> None:
    _shape(lambda share: 0.5 - 0.5 * math.cos(math.pi * share))


def embeddings_kept() -> None:
    """No decay but of the blocks' matrices."""
    real = Optimizer._adamw

    def adamw(self: Optimizer, named: Any, step: int, rate: float, decay: float, *others: Any) -> None:
        real(self, named, step, rate, 0.0, *others)

    Optimizer._adamw = adamw  # type: ignore[method-assign]


def averaged() -> None:
    """A running average of the weights over the last 2 and 5 % of the run, evaluated beside them at each evaluation."""
    update, evaluate = Trainer.update, Trainer.evaluate
    averages: dict[float, list[Tensor]] = {}

    def averaging(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
        result = update(self, step)
        weights = [p.detach() for p in self.state.model.parameters()]
        for share in (0.02, 0.05):
            average = averages.setdefault(share, [p.clone() for p in weights])
            torch._foreach_lerp_(average, weights, 1 / max(1.0, min(step, share * self.steps)))
        return result

    @torch.no_grad()
    def evaluating(self: Trainer) -> None:
        evaluate(self)
        context, model, held_out = self.context, self.state.model, self.context.shards.validation
        weights = list(self.state.model.parameters())
        kept = [p.clone() for p in weights]
        for share, average in averages.items():
            torch._foreach_copy_(weights, average)
            batches = eval_batches(held_out, self.recipe.model.context, self.micro_batches.size)
            with context.accelerator.autocast():
                nats = sum(model(batch.tokens, batch.targets).item() for batch in batches)
            bits = nats / held_out.text_bytes / math.log(2)
            self.monitor.event(self.state.step, f"average over {share:.0%} of the run: {bits:.4f} bits per byte")
        torch._foreach_copy_(weights, kept)

    Trainer.update, Trainer.evaluate = averaging, evaluating  # type: ignore[method-assign]


ALTERNATIVES: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        rms_scale,
        normuon,
        cautious,
        no_nesterov,
        two_polynomials,
        four_polynomials,
        momentum_warmup,
        sqrt_decay,
        cosine_decay,
        embeddings_kept,
        averaged,
        shared_feature,
    )
}
