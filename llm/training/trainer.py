"""The trainer: a recipe and a number, the step, in; a run folder out.

Everything but weights, moments and the step is a function of (recipe, step), so resuming is loading these and going on.
Accelerate owns devices, processes, precision and wrapping; the order of the data, randomness, the sum of gradients and
resume are ours.
"""

import math
import os
import re
import secrets
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from llm.base import atomic_io
from llm.base.constants import IGNORED
from llm.base.errors import DivergedError, GroupError, RecipeError, RefusedError, StoppedError, reason
from llm.base.hashing import mix
from llm.config.recipe import Recipe, checkpoint_name, flat, science, skipped
from llm.data.batches import Batch, BatchLoader, eval_batches
from llm.data.shards import Shards, Split
from llm.data.shuffle import WindowShuffle
from llm.data.tokenizer import Tokenizer
from llm.distributed import coordinator, environment, process, sharding
from llm.distributed.environment import save_settings
from llm.distributed.pairwise_sum import PairwiseSum
from llm.distributed.sharding import LocalShard, Sharding, local_shard
from llm.inference.generation import Sampling, continuations
from llm.insight import hints
from llm.interop import pretrained
from llm.interop.hf_files import model_files, tokenizer_files
from llm.model import cost, hf_config
from llm.model.loss import compile_loss
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer, gradient_norm, wide
from llm.optim.schedule import StepPlan, lr_factor, planned
from llm.optim.time_budget import RECORD as PLAN
from llm.optim.time_budget import TimeBudget
from llm.run_folder import checkpoint, tensor_files, trace
from llm.run_folder.checkpoint import Checkpoint
from llm.run_folder.metrics import Tracker
from llm.run_folder.model_card import FILE_NAME, model_card, thinned

SAMPLE_TOKENS = 80
FP16_SCALE, FP16_GROWTH_STEPS = 65536.0, 2000
FP16_LEAST, FP16_MOST = 1.0, 2.0**60  # of the scale; at 1 it is the gradient itself that fp16 cannot hold
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_MEMORY = re.compile("can't allocate memory|bad_alloc|out of memory")
OUT_OF_TIME = 1 << 20  # larger than any signal
Result = TypeVar("Result")


@dataclass
class TrainState:
    """`step` updates are done: for people, who count from 1, that is after step `step`."""

    step: int = 0


# ---------------------------------------------------------------------------------------------- the trainer


class Trainer:
    """One run, in this process. `recipe` is settled and has its length in steps."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        shards: Shards,
        accelerator: Accelerator,
        council: coordinator.Coordinator,
        run: Path,
    ) -> None:
        self.recipe, self.tokenizer, self.shards = recipe, tokenizer, shards
        self.accelerator, self.council, self.run = accelerator, council, run
        self.device = accelerator.device
        self.state = TrainState()
        self.identity = ""  # by which the run knows its checkpoints, from `resume` on
        self.parent: dict[str, Any] | None = None
        self.metrics: dict[str, Any] = {}  # of the evaluation at this very step
        self.best = float("inf")  # bits per byte
        self.curve: list[list[float]] = []  # step and bits per byte of the evaluations, for the model card
        self.saved = -1  # step of the newest checkpoint
        self.until = -1  # a step to stop after, as if asked to
        self.auto = True  # whether the micro-batch is ours to choose
        self.stop = 0  # the signal that asked to stop, or OUT_OF_TIME
        self.began = self.stopped_at = time.monotonic()
        self.tracker: Tracker | None = None  # the main process's
        self.record: trace.Trace | None = None  # likewise
        self.budget = TimeBudget(recipe.train.hours) if recipe.train.hours else None
        family = hf_config.family_of(recipe)
        self.beside = {**model_files(recipe.model, tokenizer, family), **tokenizer_files(tokenizer)}
        dtype = TYPES[recipe.machine.precision]
        self.layout = Sharding(recipe.machine.shard, self.device, dtype)
        with self.device:
            self.model = Transformer(recipe.model, tokenizer.vocabulary, recipe.seed, self.layout.deal, family)
        self.layout.deal(self.model, root=True)
        self.order = WindowShuffle(recipe.seed, shards.train.tokens, recipe.model.context)
        lean = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.optimizer = Optimizer(self.model, recipe.train, lean, self.layout)
        self.scale = torch.tensor(FP16_SCALE if recipe.machine.precision == "fp16" else 1.0, device=self.device)
        self.good_steps = torch.zeros((), device=self.device)
        self.sound: list[Tensor] = []  # of each update since the last look: whether loss and gradient were finite
        self.diverged = torch.zeros((), dtype=torch.bool, device=self.device)
        self.model.model.recompute = recipe.machine.recompute
        compile_loss(False)  # until `compile`
        self.wrapped: Any = self.model
        if not self.layout.sharded:
            # Placed because we say so: to find that out, accelerate would import all of torch's sharded tensors.
            self.wrapped = accelerator.prepare_model(self.model, device_placement=True)
            if process.world() > 1:
                self.wrapped.register_comm_hook(None, sharding.canonical_sum_hook)

    # ------------------------------------------------------------------ one step

    @property
    def stream(self) -> BatchLoader:
        assert isinstance(self.recipe.machine.micro_batch, int)
        return BatchLoader(
            self.shards.train,
            self.order,
            self.recipe.windows_per_step,
            self.recipe.machine.micro_batch,
            process.rank(),
            process.world(),
            skipped(self.recipe),
        )

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Do update `step`; mean loss (nats a token) and norm of the gradient, on the device, of the whole group."""
        recipe, assumed = self.recipe, self.recipe.train.tokens_per_step
        loss, tokens = self.within_memory(step)
        # Gradients were summed as if every target counted; this makes them the mean over those that do.
        scale = assumed / tokens / self.scale
        norm = gradient_norm(self.gradients(), self.layout) * scale
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        # An overflow that fp16's scale answers is no event; a loss that is not finite always is.
        sound = torch.isfinite(loss) if recipe.machine.precision == "fp16" else finite
        self.sound.append(sound)
        if recipe.train.on_nonfinite == "stop":
            self.diverged |= ~sound
        if recipe.train.clip:
            scale = scale * (recipe.train.clip / (norm + 1e-6)).clamp(max=1.0)
        share = lr_factor(step, plan=self.plan, warmup=recipe.train.warmup, decay=recipe.train.decay)
        self.optimizer.step(step, share, scale.float(), finite & ~self.diverged)
        if recipe.machine.precision == "fp16":
            self.rescale(finite)
        return loss / tokens, norm

    def within_memory(self, step: int) -> Tensor:
        """What `accumulate` gives for the batch of `step`: where memory does not bear it, in smaller micro-batches.

        Weights and moments are not touched before all gradients are there, so the step is simply done anew.
        """
        while True:
            try:
                return self.accumulate([batch.to(self.device) for batch in self.stream.at(step)])
            except (RuntimeError, MemoryError) as error:
                if not is_short_of_memory(error):
                    raise
                clear_tracebacks(error)
            self.halve(step + 1)

    def halve(self, step: int) -> None:
        """Take the next smaller micro-batch; GroupError, with the setting that may do, where that cannot be."""
        was, share = self.recipe.machine.micro_batch, self.recipe.windows_per_step // process.world()
        assert isinstance(was, int)
        size = max((n for n in range(1, was // 2 + 1) if share % n == 0), default=0)
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        short = f"no memory for micro-batches of {was} windows at step {step}"
        if not size:
            raise GroupError(f"{short}: take machine.recompute=true, or a smaller model.context or model.dim")
        # The others of a group wait in an exchange already; elsewhere the size was asked for, or decides the bits.
        if process.world() > 1 or not self.auto or self.recipe.machine.exact:
            other = "take another run=NAME" if self.recipe.machine.exact else "run the same command again"
            raise GroupError(f"{short}: {other} with machine.micro_batch={size}")
        if self.recipe.machine.compile:  # as a process would that begins with this size
            torch._dynamo.reset()
        self.recipe = replace(self.recipe, machine=replace(self.recipe.machine, micro_batch=size))
        save_settings(self.recipe, self.run)
        event = f"{short}: it is done anew in micro-batches of {size}, as are all from here on"
        if self.tracker is not None:
            self.tracker.event(step, event)
        else:
            process.say(event)

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Leave the group's sum of scale x loss / tokens_per_step in every .grad.

        Sum of the losses (nats) and count of the targets: (2,) of fp64.
        """
        exact, counter, counted = self.recipe.machine.exact, PairwiseSum(), []
        for index, batch in enumerate(batches):
            if index == 0 or exact:
                self.model.zero_grad(set_to_none=True)
            # Whole gradients are exchanged once a step, with the last micro-batch; sharded ones are dealt after each,
            # as no process has room for them whole.
            waits = index + 1 < len(batches) and not self.layout.sharded and not exact
            with self.accelerator.no_sync(self.wrapped) if waits else nullcontext():
                with self.accelerator.autocast():
                    loss = self.wrapped(batch.tokens, batch.targets, batch.windows)
                (loss * (self.scale / self.recipe.train.tokens_per_step)).backward()
            counted.append(torch.stack([loss.detach(), (batch.targets != IGNORED).sum()]).to(wide(self.device)))
            if exact or index + 1 == len(batches):
                self.layout.sum_copies([rows.local for rows in self.gradients()])
            if exact:
                counter.add([rows.local.clone() for rows in self.gradients()])
        if exact:
            for rows, total in zip(self.gradients(), counter.total(), strict=True):
                rows.local.copy_(total)
        # In the order of the micro-batches' numbers, whatever the world.
        return sharding.gather(torch.stack(counted)).transpose(0, 1).flatten(0, 1).sum(0)

    def gradients(self) -> list[LocalShard]:
        return [local_shard(p.grad) for p in self.model.parameters() if p.grad is not None]

    def rescale(self, finite: Tensor) -> None:
        """fp16's scale: halved after an overflow, doubled after FP16_GROWTH_STEPS steps without; all on the device."""
        self.good_steps = torch.where(finite, self.good_steps + 1, 0)
        grown = self.good_steps >= FP16_GROWTH_STEPS
        doubled = (self.scale * 2).clamp(max=FP16_MOST)
        self.scale = torch.where(finite, torch.where(grown, doubled, self.scale), self.scale / 2)
        self.good_steps = torch.where(grown, 0, self.good_steps)

    # ------------------------------------------------------------------ the loop

    def fit(self) -> TrainState:
        """Train to the recipe's last step, or to the first signal (StoppedError); leave a checkpoint either way."""
        recipe, state = self.recipe, self.state
        if process.rank() == 0:
            self.tracker = Tracker(self.run, recipe, state.step, {"world": process.world()}, again=self.owes_evaluation)
            self.record = trace.Trace(self.run, state.step)
        if self.owes_evaluation:
            self.evaluate()
        seconds, counted_from = 0.0, state.step
        while state.step < self.steps and not self.asked_to_stop():
            began = time.perf_counter()
            loss, norm = self.update(state.step)
            state.step += 1
            self.metrics = {}
            last = state.step == self.steps
            if last and self.budget is not None:
                self.budget.finished = True
                self.keep_plan(self.budget)
            if last or state.step % recipe.tracking.every == 0:
                self.check()
                self.sign(loss)
                seconds += time.perf_counter() - began
                self.log(loss, norm, seconds / (state.step - counted_from))
                seconds, counted_from = 0.0, state.step
            else:
                seconds += time.perf_counter() - began
            began = time.perf_counter()
            if last or state.step % recipe.checkpoint.every == 0 or self.evaluation_due:
                self.save()
            if self.owes_evaluation:
                self.evaluate()
            if self.budget is not None:
                self.revise(self.budget, time.perf_counter() - began)
        if state.step < self.steps:
            self.save()
            if self.budget is not None:
                self.keep_plan(self.budget)
            raise StoppedError(
                f"stopped ({self.why_stop()}) after step {state.step} of {self.steps}; all is saved, "
                "the same command goes on"
            )
        return state

    @property
    def plan(self) -> StepPlan:
        return self.budget.plan if self.budget is not None else [(0, self.recipe.train.steps)]

    @property
    def steps(self) -> int:
        """Updates of the whole run, as planned by now."""
        return planned(self.state.step, self.plan)

    def revise(self, budget: TimeBudget, paused: float) -> None:
        """Under a time budget: plan anew how many steps it allows, where that is due; durable before it counts."""
        budget.paused(paused)
        steps = self.council.largest(budget.proposal(self.state.step) if process.rank() == 0 else 0)
        if steps:
            budget.revise(self.state.step, steps)
            self.keep_plan(budget)
            if self.tracker is not None:
                self.tracker.plan(self.steps)

    def keep_plan(self, budget: TimeBudget) -> None:
        with self.council.error_barrier():
            if self.council.writes:
                atomic_io.write_checksummed(self.run / PLAN, budget.record())

    def check(self) -> None:
        """Read which of the last updates were masked, as their loss or gradient was not finite; record or end by it.

        DivergedError under train.on_nonfinite = stop; nothing since has touched the weights.
        """
        sound = torch.stack(self.sound).tolist() if self.sound else []
        self.sound.clear()
        masked = [self.state.step - len(sound) + index for index, fine in enumerate(sound) if not fine]
        for step in masked:
            texts = self.texts(step)
            if self.tracker is not None:
                self.tracker.event(step + 1, "loss or gradient not finite: the update was left out", texts=texts)
            if self.recipe.train.on_nonfinite == "stop":
                recipe, batch = self.recipe, self.stream.first(step) // self.recipe.windows_per_step + 1
                source = f"{recipe.run}/step-{self.saved:06d}" if self.saved >= 0 else recipe.from_
                raise DivergedError(
                    f"the loss or the gradient of step {step + 1} was not finite and has touched nothing; "
                    f"{self.run / 'checkpoints'} holds what was saved before. Lower train.learning_rate under another "
                    f"run=NAME, take train.on_nonfinite=skip, or leave its batch out: run=NAME "
                    f"{f'from={source} ' if source else ''}train.skip=[{','.join([*recipe.train.skip, str(batch)])}]"
                )
        if self.scale.item() < FP16_LEAST:
            raise DivergedError(
                f"the gradient is not finite in fp16 at step {self.state.step}, however small its scale, and has "
                f"touched nothing; {self.run / 'checkpoints'} holds what was saved before. Take another run=NAME with "
                "machine.precision=bf16 or fp32, or with a lower train.learning_rate"
            )

    def texts(self, step: int, most: int = 4) -> list[str]:
        """Beginnings of the first windows that the group reads at `step`."""
        starts = self.order.starts(np.arange(most) + self.stream.first(step)).tolist()
        return [self.tokenizer.decode(self.shards.train.read(start, start + 60).tolist()) for start in starts]

    def sign(self, loss: Tensor) -> None:
        """Add this step to the run's rolling record."""
        sums = trace.checksum(self.weights(), self.layout)
        if self.record is not None:
            first, last = self.record.step, self.state.step
            order, per_step = self.order, self.recipe.windows_per_step
            positions = [self.stream.first(step) + np.arange(per_step) for step in range(first, last)]
            self.record.add(
                self.state.step,
                windows=trace.windows(order, np.concatenate(positions)) if positions else "",
                loss=float(loss).hex(),
                weights=f"{mix(*sums.tolist()):016x}",
            )

    def log(self, loss: Tensor, norm: Tensor, step_seconds: float) -> None:
        if self.tracker is None:
            return
        recipe, step = self.recipe, self.state.step
        share = lr_factor(step - 1, plan=self.plan, warmup=recipe.train.warmup, decay=recipe.train.decay)
        self.tracker.log(
            step,
            loss=loss,
            learning_rate=recipe.train.learning_rate * share,
            gradient_norm=norm,
            tokens_per_second=recipe.train.tokens_per_step / step_seconds,
            epoch=self.epochs_seen,
            seconds_left=(self.steps - step) * step_seconds,
            utilisation=self.step_flops / step_seconds / self.measured_flops,
        )

    @property
    def epochs_seen(self) -> float:
        return self.state.step * self.recipe.windows_per_step / self.order.windows

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is one of those after which the run is evaluated."""
        at_end = self.state.step == self.steps
        watched = self.shards.validation.tokens > 0 or bool(self.recipe.evaluate.prompts)
        return watched and (at_end or self.state.step % self.recipe.evaluate.every == 0)

    @property
    def owes_evaluation(self) -> bool:
        """Whether this step's checkpoint is there, and its evaluation is due and not yet in it."""
        return self.saved == self.state.step and self.evaluation_due and not self.metrics

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss and bits per byte of the validation side, and the recipe's prompts, into the record and the checkpoint.

        The checkpoint of this step is there before: nothing that fails here loses a step.
        """
        split = self.shards.validation
        side = self.attempted("no evaluation", split.verified) if split.tokens else None
        nats = self.attempted("no evaluation", lambda: self.nats_of(side)) if side else None
        if not split.tokens:
            self.metrics = {"bits_per_byte": None}
        if nats is not None:
            self.judge(sharding.gather(nats).sum().item())
        # A sharded model speaks with all its processes.
        if self.recipe.evaluate.prompts:
            speaks = process.rank() == 0 or self.layout.sharded
            texts = self.attempted("no samples", lambda: self.samples() if speaks else [])
            if self.tracker is not None and texts is not None:
                self.tracker.samples(self.state.step, dict(zip(self.recipe.evaluate.prompts, texts, strict=True)))
        if self.tracker is not None and self.state.step == self.steps and self.tracker.evaluations:
            self.tracker.say(hints.of_run(self.recipe, self.tracker.evaluations))
        self.layout.rest(self.model)
        self.complete()

    def attempted(self, otherwise: str, act: Callable[[], Result]) -> Result | None:
        """`act()`, which only watches; None, and an event that says `otherwise`, where it fails in any process."""
        result, why = None, ""
        try:
            result = act()
        except Exception as error:  # whatever it is, no number of the training depends on it
            if self.layout.sharded and not isinstance(error, RefusedError):
                raise  # it was in the middle of an exchange, in which others wait
            why = reason(error)
            clear_tracebacks(error)
        if not self.council.largest(bool(why)):
            return result
        if self.tracker is not None:
            self.tracker.event(self.state.step, f"{otherwise}: {why or 'another process failed in it'}")
        elif why:
            process.warn(f"{otherwise}: {why}")
        return None

    def nats_of(self, side: Split) -> Tensor:
        """This process's part of the loss of `side`, a sum: (1,)."""
        assert isinstance(self.recipe.machine.micro_batch, int)
        total = torch.zeros(1, dtype=wide(self.device), device=self.device)
        for batch in eval_batches(
            side,
            self.recipe.model.context,
            self.recipe.machine.micro_batch,
            process.rank(),
            process.world(),
        ):
            batch = batch.to(self.device)
            with self.accelerator.autocast():
                total += self.model(batch.tokens, batch.targets)
        return total

    def judge(self, nats: float) -> None:
        """Keep what the validation side costs, in `metrics`, `best` and `curve`, and in the record."""
        bits = nats / self.shards.validation.text_bytes / 0.6931471805599453
        if not math.isfinite(bits):
            self.metrics = {"bits_per_byte": None}
            if self.tracker is not None:
                self.tracker.event(self.state.step, "the validation loss is not finite: it counts for nothing")
            return
        self.metrics = {
            "val_loss": nats / (self.shards.validation.tokens - 1),
            "bits_per_byte": bits,
            "best": bits < self.best,
            "epochs_seen": self.epochs_seen,
        }
        self.best = min(self.best, bits)
        self.curve = thinned([*self.curve, [self.state.step, bits]])
        if self.tracker is not None:
            self.tracker.log(self.state.step, **self.metrics)

    def samples(self) -> list[str]:
        prompts = [[self.tokenizer.bos, *self.tokenizer.encode(prompt)] for prompt in self.recipe.evaluate.prompts]
        # Blocks whose rows are dealt are gathered in the type in which they are multiplied.
        with self.accelerator.autocast() if self.layout.sharded else nullcontext():
            return continuations(
                self.model,
                prompts,
                SAMPLE_TOKENS,
                Sampling(),
                self.tokenizer.decode,
                self.recipe.seed,
                self.tokenizer.ends,
                self.tokenizer.banned,
            )

    # ------------------------------------------------------------------ stopping and saving

    def asked_to_stop(self) -> bool:
        """Whether any process was; agreed on the CPU's side, so that no step waits for the device."""
        if self.recipe.machine.stop_after and time.monotonic() - self.began > self.recipe.machine.stop_after * 3600:
            self.stop = self.stop or OUT_OF_TIME
        if self.state.step == self.until:
            self.stop = self.stop or signal.SIGTERM
        self.stop = self.council.largest(self.stop, after=f"step {self.state.step}")
        return self.stop > 0

    def why_stop(self) -> str:
        return "machine.stop_after" if self.stop == OUT_OF_TIME else signal.Signals(self.stop).name

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember to stop; a person's second Ctrl-C leaves at once.

        A launcher passes Ctrl-C on to its children, who have it from the terminal already, and its death arrives as
        SIGTERM: neither is a person.
        """
        now = time.monotonic()
        if self.stop and number == signal.SIGINT and now - self.stopped_at > 1:
            raise KeyboardInterrupt
        if not self.stop:
            self.stop, self.stopped_at = number, now
            if process.rank() == 0:
                with suppress(OSError):  # the terminal may be what went
                    os.write(2, b"\nasked to stop: finishing the step and saving ...\n")

    def save(self) -> None:
        """Leave a checkpoint of this step, unless there is one; where an evaluation is due, `complete` adds it."""
        if self.saved == self.state.step:
            return
        self.check()
        self.flush()
        card = {FILE_NAME: self.card()}
        checkpoint.save(
            checkpoint.folder_of(self.run, self.state.step),
            weights=self.weights(),
            moments=self.optimizer.moments,
            manifest=self.manifest(),
            extra_files=self.beside if self.evaluation_due else {**self.beside, **card},
            unlisted_files=card if self.evaluation_due else {},
            coordinator=self.council,
            sharding=self.layout,
        )
        self.saved = self.state.step
        if not self.evaluation_due:
            self.retain()

    def complete(self) -> None:
        """Add to this step's checkpoint its evaluation, and the card that tells of it."""
        self.flush()
        with self.council.error_barrier():
            if self.council.writes:
                folder = checkpoint.folder_of(self.run, self.state.step)
                checkpoint.amend(folder, {FILE_NAME: self.card()}, **self.evaluated())
        self.retain()

    def flush(self) -> None:
        """Make the records durable, as a checkpoint is about to rest on them."""
        for each in (self.tracker, self.record):
            if each is not None:
                each.flush()

    def retain(self) -> None:
        if self.council.writes:
            checkpoint.retain(self.run, self.recipe.checkpoint.keep, self.state.step)

    def card(self) -> bytes:
        numbers = sum(math.prod(rows.shape) for rows in self.weights().values())
        return model_card(self.recipe, self.tokenizer, self.shards, self.state.step, self.curve, numbers)

    def weights(self) -> dict[str, LocalShard]:
        return {name: local_shard(p) for name, p in self.model.named_parameters()}

    def evaluated(self) -> dict[str, Any]:
        """What evaluations have told of this step and of those before, for the manifest."""
        best = None if self.best == float("inf") else self.best
        return {"metrics": self.metrics, "best": best, "curve": self.curve}

    def manifest(self) -> dict[str, Any]:
        machine = {name: value for name, value in flat(self.recipe).items() if name not in science(self.recipe)}
        return {
            "run": self.identity,
            "step": self.state.step,
            "science": science(self.recipe),
            "machine": {**machine, "world": process.world(), "torch": torch.__version__},
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.shards.fingerprint,
            "parent": self.parent,
            "budget": self.budget.record() if self.budget is not None else None,
            **self.evaluated(),
            "scale": [self.scale.item(), self.good_steps.item()],
        }

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, or from the recipe's `from`, or begin.

        RefusedError where the checkpoint belongs to another science half, text or tokenizer.
        """
        found = self.newest()
        self.identity = self.identify(found)
        if self.budget is not None:
            self.resume_plan(self.budget, found)
        if found is not None:
            refuse_difference(found, self.recipe, self.tokenizer.fingerprint, self.shards.fingerprint)
            self.load(found)
            self.saved = found.step
            self.parent = found.manifest["parent"]
            # Not looked for, as disks may have kept others; and one may have been killed before it was told the last.
            told = self.council.from_main("evaluated", {name: found.manifest.get(name) for name in self.evaluated()})
            self.metrics, self.curve = told["metrics"], told["curve"] or []
            self.best = told["best"] or float("inf")
        elif self.recipe.from_:
            run = self.recipe.from_.partition("/")[0]
            folder = checkpoint.folder_of(self.run.parent / run, self.recipe.from_step)
            if not folder.is_dir():
                there = ", ".join(each.name for each in checkpoint.folders(self.run.parent / run)) or "none"
                raise RecipeError(f"from = {self.recipe.from_} is not there; checkpoints of {run}: {there}")
            source = checkpoint.open_checkpoint(folder)
            if source.manifest["tokenizer"] != self.tokenizer.fingerprint:
                mine = self.run.parent / run / "tokenizer" / "tokenizer.model"
                raise RefusedError(
                    f"from = {self.recipe.from_} has another tokenizer than this recipe's text gives: keep its own by "
                    f"tokenizer.path={mine}"
                )
            refuse_shape(source, self.recipe)
            self.load(source)
            self.parent = {
                "from": self.recipe.from_,
                "digest": source.digest,
                "science": source.manifest["science"],
                "data": source.manifest["data"],
            }
        elif self.recipe.model.from_:
            folder = atomic_io.expanded(self.recipe.model.from_)
            self.parent = {"model": folder.name, "digest": pretrained.load(folder, self.weights())}
        begin, step = (self.plan[0][0], self.state.step) if self.plan else (0, 0)
        if step < begin or (found is None and self.plan and step >= self.steps):
            raise RefusedError(
                f"{self.run / PLAN} plans steps {begin + 1:,} to {self.plan[-1][1]:,}, which do not go on from step "
                f"{step:,}, where this run begins: it is another run's plan, remove it"
            )

    def identify(self, found: Checkpoint | None) -> str:
        """The identity of the run that goes on from `found`, or a new one where it begins.

        RefusedError where this disk's checkpoint is of another run than that of the main process's disk.
        """
        made = found.manifest.get("run") if found else None
        kept = None
        try:
            kept = checkpoint.identity(self.run) if found else None
        except RefusedError as error:
            process.warn(f"{error}; it is written anew")
        agreed = str(self.council.from_main("identity", kept or made or self.beginning()))
        if made and made != agreed:
            raise RefusedError(
                f"{self.run / 'checkpoints'} of process {process.rank()} is of another run than that of process 0: "
                "copy that one there"
            )
        return agreed

    def beginning(self) -> str:
        """Digest of all that decides the bits of a run that begins here, as long as its machine half stays."""
        recipe = self.recipe
        machine = {name: value for name, value in flat(recipe).items() if name.startswith("machine.")}
        machine |= {"machine.stop_after": 0, "device": self.device.type, "world": process.world()}
        by_the_clock = secrets.token_hex(8) if self.budget is not None else ""  # its plan is like no other
        data = [self.tokenizer.fingerprint, self.shards.fingerprint]
        return atomic_io.digest_of([science(recipe), machine, torch.__version__, *data, by_the_clock])[:16]

    def resume_plan(self, budget: TimeBudget, found: Checkpoint | None) -> None:
        """Take up what the run planned; what was planned beyond the checkpoint is followed as far as it reaches."""
        record, path = found and found.manifest.get("budget"), self.run / PLAN
        if path.exists():
            try:
                kept = atomic_io.read_checksummed(path)
                record = {**kept, "seconds": max(kept["seconds"], record["seconds"] if record else 0)}
            except RefusedError as error:
                process.warn(f"{error}; the plan that the checkpoint holds is taken instead")
        if record := self.council.from_main("plan", record):
            budget.take(record)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is valid on every disk of the group."""
        bound, council = sys.maxsize, self.council
        while True:
            with council.error_barrier():
                found = checkpoint.newest(self.run, process.warn, bound) if council.writes else None
            mine = found.step if found else -1
            newest = council.largest(mine)
            oldest = -council.largest(-(mine if council.writes else newest))
            if oldest == newest:
                folder = checkpoint.folder_of(self.run, newest)
                return Checkpoint(folder, checkpoint.read_manifest(folder)) if newest >= 0 else None
            with council.error_barrier():
                if council.writes and mine < 0:
                    raise RefusedError(
                        f"{self.run} has no checkpoint on the disk of process {process.rank()}, others have "
                        f"step {newest}: copy it there"
                    )
            bound = oldest

    def load(self, source: Checkpoint) -> None:
        tensor_files.load_tensors(source.folder / checkpoint.WEIGHTS, self.weights())
        tensor_files.load_tensors(source.folder / checkpoint.MOMENTS, self.optimizer.moments)
        self.state.step = source.step
        scale, good_steps = source.manifest["scale"]
        self.scale.fill_(scale)
        self.good_steps.fill_(good_steps)

    # ------------------------------------------------------------------ before the first step

    @cached_property
    def measured_flops(self) -> float:
        """Operations a second of this machine's own matrix product, in the type that the model is multiplied in."""
        dtype = TYPES[self.recipe.machine.precision]
        for size in (8192, 4096, 2048) if self.device.type != "cpu" else ():
            try:
                return environment.measured_flops(self.device, dtype, size)
            except torch.OutOfMemoryError as error:  # the model has nearly all of it
                clear_tracebacks(error)
        return environment.measured_flops(self.device, dtype, 1024)

    @cached_property
    def step_flops(self) -> float:
        """Operations of a step in each process."""
        each = cost.flops_per_token(self.recipe.model, self.tokenizer.vocabulary)
        return each * self.recipe.train.tokens_per_step / process.world()

    def costs(self) -> tuple[cost.Memory, cost.Traffic]:
        """By formula: what the first process holds, and what each sends a step."""
        recipe, layout = self.recipe, self.layout
        shape, vocabulary, muon = recipe.model, self.tokenizer.vocabulary, recipe.train.optimizer == "muon"
        assert isinstance(recipe.machine.micro_batch, int)
        traffic = cost.traffic(
            shape,
            vocabulary,
            muon=muon,
            parts=layout.parts,
            copies=layout.copies,
            micro_batches=recipe.windows_per_step // recipe.machine.micro_batch // process.world(),
            gathered=layout.dtype.itemsize,
            orthogonalised=self.optimizer.orthogonalise_in.itemsize,
            exact=recipe.machine.exact,
        )
        return cost.memory(shape, vocabulary, muon=muon, parts=layout.parts), traffic

    def rehearse(self) -> float:
        """Seconds of a step to expect, from one micro-batch after a small one; weights and moments are left alone.

        On an accelerator `auto` is settled here: the largest micro-batch that runs in its memory.
        """
        share = self.recipe.windows_per_step // process.world()
        if self.recipe.machine.micro_batch == "auto":
            fits = 1
            for size in [n for n in range(1, share + 1) if share % n == 0]:
                try:
                    self._pass(size)
                    short = False
                except torch.OutOfMemoryError as error:
                    clear_tracebacks(error)
                    short = True
                if self.council.largest(short):
                    if self.layout.sharded:  # the engine is left in the middle of what it gathered
                        raise GroupError(
                            f"no memory for micro-batches of {size} windows: run the same command again with "
                            f"machine.micro_batch={fits}, or with machine.recompute=true"
                        )
                    break
                fits = size
            torch.cuda.empty_cache()
            self.recipe = replace(self.recipe, machine=replace(self.recipe.machine, micro_batch=fits))
        compiled = False
        while True:
            assert isinstance(self.recipe.machine.micro_batch, int)
            try:
                if self.recipe.machine.compile and not compiled:
                    compiled = self.compile()
                if not compiled:  # a compiled one would be done anew for another size
                    self._pass(1)
                return self._rehearse(self.recipe.machine.micro_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_short_of_memory(error):
                    raise
                clear_tracebacks(error)
            self.halve(self.state.step + 1)
            compiled = False

    def compile(self) -> bool:
        """Compile each block and say how long it took; go on without (False) where this machine cannot."""
        from torch._dynamo.exc import TorchDynamoException  # a second that others need not wait

        assert isinstance(self.recipe.machine.micro_batch, int)
        warnings.filterwarnings(
            "ignore", "The .grad attribute of a Tensor that is not a leaf"
        )  # the compiler's own doing
        began = time.perf_counter()
        for block in self.model.blocks:
            block.compile()
        compile_loss(self.device.type == "cuda")  # on a CPU it gains nothing
        try:
            self._pass(self.recipe.machine.micro_batch)
        except TorchDynamoException as error:
            why = " ".join(str(error).split())[:160]
            if process.world() > 1:  # the others may be able to, and wait
                raise GroupError(f"machine.compile cannot be done here: take machine.compile=false ({why})") from None
            process.say(f"machine.compile cannot be done here, going on without ({why})")
            for block in self.model.blocks:
                block._compiled_call_impl = None
            compile_loss(False)
            clear_tracebacks(error)
            self.recipe = replace(self.recipe, machine=replace(self.recipe.machine, compile=False))
            return False
        process.say(f"machine.compile: the blocks were compiled in {time.perf_counter() - began:.0f} s")
        return True

    def _pass(self, micro_batch: int) -> None:
        """Forward and backward of one micro-batch of this size, whose gradient is forgotten."""
        tokens = torch.zeros(micro_batch, self.recipe.model.context, dtype=torch.int64, device=self.device)
        with nullcontext() if self.layout.sharded else self.accelerator.no_sync(self.wrapped):
            with self.accelerator.autocast():
                loss = self.wrapped(tokens, tokens, tokens[:, 0].contiguous())  # laid out as those of a batch are
            loss.backward()
        loss.item()
        self.model.zero_grad(set_to_none=True)

    def _rehearse(self, micro_batch: int) -> float:
        """Seconds of a step in micro-batches of this size, by running one of them and an update that is masked."""
        began = time.perf_counter()
        self._pass(micro_batch)
        passed = time.perf_counter()
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        nothing = torch.zeros((), device=self.device)
        self.optimizer.step(0, 0.0, nothing + 1, nothing > 0)
        self.model.zero_grad(set_to_none=True)
        passes = self.recipe.windows_per_step // process.world() // micro_batch
        return (passed - began) * passes + nothing.item() + time.perf_counter() - passed


def is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or NO_MEMORY.search(str(error)) is not None


def clear_tracebacks(error: BaseException) -> None:
    """Empty the frames that an exception holds: activations, and contexts of the engine that were entered in them.

    Before torch 2.13 a block that is recomputed, cut off, would take the next pass's activations for its own.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


# Which tensors there are of weights and moments.
SHAPE = tuple(f"model.{name}" for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "tied"))
SHAPE = (*SHAPE, "train.optimizer")
# Keys that follow from others where their length is one in tokens or epochs, or they are `auto`.
FOLLOWS = {
    "train.steps": {"train.tokens_per_step"},
    "model.dropout": {"train.steps", "train.tokens_per_step"},
    "train.weight_decay": {"train.steps", "train.tokens_per_step", "train.learning_rate"},
}


def refuse_shape(source: Checkpoint, recipe: Recipe) -> None:
    """RefusedError that names the first key by which a checkpoint for `from` has other tensors than this recipe."""
    stored, wanted, run = source.manifest["science"], science(recipe), source.folder.parent.parent
    for name in SHAPE:
        if stored.get(name) != wanted[name]:
            raise RefusedError(
                f"from = {recipe.from_} has {name} = {stored.get(name)}, this recipe {wanted[name]}: "
                f"use {run / 'recipe.yaml'}"
            )


def refuse_difference(found: Checkpoint, recipe: Recipe, tokenizer: str, data: str) -> None:
    """RefusedError that names what the run was trained with, where this recipe's science half or text is another.

    That is the text, as much else follows from it, or the first key that differs and follows from no other.
    """
    other = "take another run=NAME"
    ways = f"{other}, or start a new run from it with run=NAME from={recipe.run}/{found.folder.name}"
    stored, wanted = dict(found.manifest["science"]), science(recipe)
    if isinstance(stored.get("from"), str):
        stored["from"] = checkpoint_name(stored["from"])  # earlier ones kept it as it was written
    if found.manifest["format"] == 1 and stored.get("train.skip") != wanted["train.skip"]:
        ways = f"train.skip once counted steps from 0, and now from 1, as all messages do; {ways}"
    differ = [name for name in [*wanted, *stored] if stored.get(name) != wanted.get(name)]
    reads_alike = not any(name.startswith(("text.", "tokenizer.", "model.from")) for name in differ)
    if reads_alike and found.manifest["data"] != data:
        cause = "another text"
        if found.manifest["tokenizer"] != tokenizer:
            given = recipe.tokenizer.path or recipe.model.from_
            cause = "another tokenizer" if given else "another text, and so with another tokenizer"
        raise RefusedError(
            f"run {recipe.run} was trained with {cause} (fingerprint {found.manifest['data'][:12]}, now {data[:12]}): "
            f"{ways}"
        )
    for name in differ:
        if not FOLLOWS.get(name, set()).intersection(differ):
            raise RefusedError(
                f"run {recipe.run} was trained with {name} = {stored.get(name)}, "
                f"this recipe says {wanted.get(name)}: {other if name in SHAPE else ways}"
            )
