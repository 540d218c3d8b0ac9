"""Evaluation of a run while it trains: held-out loss and samples. Nothing that fails here ends the run."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from llm.base.errors import RefusedError, reason
from llm.data.batches import eval_batches, packed_batches
from llm.data.chat_template import prompt_ids, template_of
from llm.data.mixture import MixedShuffle
from llm.data.packing import WindowTable, begin_of, table_of
from llm.data.shards import Shards, Split
from llm.distributed import process, sharding
from llm.inference.generation import continuations
from llm.inference.sampling import Sampling
from llm.optim.optimizer import wide
from llm.run_folder.model_card import thinned
from llm.training.context import RunContext, TrainState
from llm.training.memory import clear_tracebacks
from llm.training.monitor import Monitor

SAMPLE_TOKENS = 80
Result = TypeVar("Result")
HeldOut: TypeAlias = tuple[float, int, int, float]  # loss (a sum in nats), targets, bytes, windows


class Evaluator:
    """Evaluates a run. `metrics`: results at this step, empty before; `best`, `curve`: of the run so far."""

    def __init__(self, context: RunContext, state: TrainState, monitor: Monitor) -> None:
        self.context, self.state, self.monitor = context, state, monitor
        self.metrics: dict[str, Any] = {}
        self.best = math.inf  # bits per byte
        self.curve: list[list[float]] = []  # step and bits per byte of the evaluations, for the model card

    def results(self) -> dict[str, Any]:
        """For the manifest of this step's checkpoint."""
        best = None if self.best == math.inf else self.best
        return {"metrics": self.metrics, "best": best, "curve": self.curve}

    def resume(self, results: dict[str, Any]) -> None:
        """Take up what `results` said when the checkpoint was saved."""
        self.metrics, self.curve = results["metrics"], results["curve"] or []
        self.best = results["best"] or math.inf

    @torch.no_grad()
    def evaluate(self, micro_batch: int) -> None:
        """Held-out loss into `metrics` and the record, then samples. The checkpoint of this step is already saved."""
        prompts, tracker, split = self.context.recipe.evaluate.prompts, self.monitor.tracker, self.context.sharding
        self._measure(micro_batch)
        if prompts:
            speaks = process.rank() == 0 or split.sharded  # a sharded model needs all its ranks
            texts = self._attempt("no samples", lambda: self._samples() if speaks else [])
            if tracker is not None and texts is not None:
                tracker.samples(self.state.step, list(zip(prompts, texts, strict=True)))
        split.reshard(self.state.model)

    @torch.no_grad()
    def before(self, micro_batch: int) -> None:
        """Record the losses of the initial weights, evaluate.also included; leave `best` and `curve` as they are."""
        best, curve = self.best, self.curve
        self.best = -math.inf  # these weights are no checkpoint of the run's
        self._measure(micro_batch)
        self.metrics, self.best, self.curve = {}, best, curve
        self.context.sharding.reshard(self.state.model)

    def _measure(self, micro_batch: int) -> None:
        """The losses of the held-out side, and of that of evaluate.also."""
        shards, order = self.context.shards, self.context.order
        if not shards.validation.tokens:
            self.metrics = {"bits_per_byte": None}
            return
        also: dict[str, Any] = {}
        if shards.also is not None and (there := self._held_out(shards.also, micro_batch)) and there[1]:
            also = {"also_bits_per_byte": there[0] / there[2] / math.log(2)}
        found = {name: self._held_out(each, micro_batch) for name, each in shards.sources.items()}
        measured = {name: each for name, each in found.items() if each is not None and each[1]}
        if None in found.values():
            return  # an event says why
        if not measured:
            self.metrics = {"bits_per_byte": None}
            return
        if isinstance(order, MixedShuffle):
            also["sources"] = self._of_sources(order, measured)
            # Of the held-out windows, mixed as those of the training side are.
            nats, targets, size = (
                sum(order.shares[name] * each[at] / each[3] for name, each in measured.items()) for at in range(3)
            )
            self._keep(nats, targets, size, also)
        else:
            self._keep(*measured[""][:3], also)

    def _of_sources(self, order: MixedShuffle, measured: dict[str, HeldOut]) -> dict[str, dict[str, float]]:
        """For the record: the loss of each source, and how much of it the run has read."""
        read = self.context.windows_read(self.state.step)
        return {
            name: {
                "val_loss": nats / targets,
                "bits_per_byte": nats / text_bytes / math.log(2),
                "windows": read[name],
                "epochs": read[name] / order.sources[name][0].windows,
            }
            for name, (nats, targets, text_bytes, _) in measured.items()
        }

    def _held_out(self, shards: Shards, micro_batch: int) -> HeldOut | None:
        """Loss (a sum in nats) of the validation side, with the number of targets, their bytes, and windows.

        Zeros where it holds no targets; None, and an event, if it cannot be measured.
        """
        held_out = self._attempt("no evaluation", shards.validation.verified)
        if held_out is None:
            return None
        table = table_of(self.context.recipe, held_out) if shards.is_chat else None
        if not (table.targets if table else held_out.tokens > 1):
            return 0.0, 0, 0, 0.0
        nats = self._attempt("no evaluation", lambda: self._nats(held_out, table, micro_batch))
        if nats is None:
            return None
        total = sharding.gather(nats).sum().item()
        if table is None:
            targets = held_out.tokens - 1
            return total, targets, held_out.text_bytes, targets / self.context.recipe.model.context
        bytes_of = self.context.tokenizer.bytes_of
        size = max(1, sum(len(bytes_of(id)) for id in table.target_ids().tolist()))
        return total, table.targets, size, len(table.windows)

    def _attempt(self, otherwise: str, act: Callable[[], Result]) -> Result | None:
        """The result of `act`; None, and an event, if it fails on any rank."""
        result, why = None, ""
        try:
            result = act()
        except Exception as error:  # of any kind: no number of the training depends on it
            if self.context.sharding.sharded and not isinstance(error, RefusedError):
                raise  # in the middle of a collective, in which the other ranks wait
            why = reason(error)
            clear_tracebacks(error)
        if not self.context.coordinator.largest(bool(why)):
            return result
        if self.monitor.tracker is not None:
            self.monitor.event(self.state.step, f"{otherwise}: {why or 'another process failed in it'}")
        elif why:
            process.warn(f"{otherwise}: {why}")
        return None

    def _nats(self, held_out: Split, table: WindowTable | None, micro_batch: int) -> Tensor:
        """This rank's part of the held-out loss, a sum: (1,)."""
        context, device = self.context, self.context.device
        total = torch.zeros(1, dtype=wide(device), device=device)
        rank, world = process.rank(), process.world()
        if table is None:
            begin = begin_of(context.recipe, held_out)
            batches = eval_batches(held_out, context.recipe.model.context, micro_batch, rank, world, begin)
        else:
            batches = packed_batches(table, micro_batch, rank, world)
        for batch in batches:
            batch = batch.to(device)
            with context.accelerator.autocast():
                given = {} if batch.segments is None else {"segments": batch.segments}
                total += self.state.model(batch.tokens, batch.targets, **given)
        return total

    def _keep(self, nats: float, targets: float, text_bytes: float, also: dict[str, Any]) -> None:
        step = self.state.step
        bits = nats / text_bytes / math.log(2)
        if not math.isfinite(bits):
            self.metrics = {"bits_per_byte": None}
            self.monitor.event(step, "the validation loss is not finite; this evaluation is ignored")
            return
        self.metrics = {
            "val_loss": nats / targets,
            "bits_per_byte": bits,
            **also,
            "best": bits < self.best,
            "epochs_seen": self.context.epochs_seen(step),
        }
        self.best = min(self.best, bits)
        self.curve = thinned([*self.curve, [step, bits]])
        if self.monitor.tracker is not None:
            self.monitor.tracker.log(step, **self.metrics)

    def _samples(self) -> list[str]:
        context, tokenizer = self.context, self.context.tokenizer
        is_chat = context.shards.is_chat
        prompts = [prompt_ids(tokenizer, prompt, chat=is_chat) for prompt in context.recipe.evaluate.prompts]
        template = template_of(tokenizer) if is_chat else None
        # Sharded blocks are gathered in the type they are multiplied in.
        with context.accelerator.autocast() if context.sharding.sharded else nullcontext():
            model, seed = self.state.model, context.recipe.seed
            return continuations(model, tokenizer, prompts, SAMPLE_TOKENS, Sampling(), seed, template, fixed=False)
