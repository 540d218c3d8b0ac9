"""The trainer: builds a run's model and optimizer, and takes it from one step to the next.

Apart from weights, moments and the step, everything is a function of (recipe, step): resuming means loading these.
Accelerate owns devices, processes, precision and wrapping; the order of the data, randomness, the sum of gradients and
resume are ours.
"""

import time
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from llm.base.errors import RecipeError, StoppedError
from llm.distributed import process
from llm.distributed.environment import DTYPES, measured_flops
from llm.insight import hints
from llm.model import cost, hf_config
from llm.model.loss import compile_loss
from llm.model.transformer import Transformer
from llm.optim.optimizer import PREFIX_STEPS, Optimizer
from llm.run_folder import checkpoint
from llm.training import teachers
from llm.training.context import RunContext, TrainState
from llm.training.evaluation import Evaluator
from llm.training.length import Length
from llm.training.memory import within_memory
from llm.training.micro_batch import MicroBatches
from llm.training.monitor import Monitor
from llm.training.resume import Checkpoints
from llm.training.sampling import SampledSoftmax
from llm.training.step import FP16_SCALE, GradientStep
from llm.training.stopping import ON_PANEL, StopRequest


class Trainer:
    """Trains one run in this process; its parts share one RunContext and one TrainState."""

    def __init__(self, context: RunContext, stop_at: int = -1) -> None:
        self.context, self.recipe = context, context.recipe
        self.state = new_state(context)
        wrapped = wrap(context, self.state.model)
        self.gradient_step = GradientStep(context, self.state, wrapped)
        self.length, self.softmax = Length(context), SampledSoftmax(context)
        self.monitor = Monitor(context, self.state, self.gradient_step, self.length)
        self.micro_batches = MicroBatches(context, self.state, wrapped, self.monitor.event)
        self.evaluator = Evaluator(context, self.state, self.monitor)
        self.checkpoints = Checkpoints(context, self.state, self.length, self.micro_batches, self.evaluator)
        self.stop = StopRequest(context.coordinator, self.recipe.machine.stop_after, stop_at)

    # ------------------------------------------------------------------ the loop

    def fit(self, step_seconds: float) -> None:
        """Train to the last step, or to the first request to stop (StoppedError); save a checkpoint either way.

        `step_seconds`: of a step, as rehearsed; the record keeps the plan that follows from it.
        """
        state, clock = self.state, StepClock(self.state.step)
        goes_on = self.recipe.text.sources and (self.recipe.model.from_ or self.recipe.from_)
        begins = self.checkpoints.saved < 0 and bool(self.context.shards.also or goes_on)
        self.monitor.open(evaluate_again=self.owes_evaluation or begins, step_seconds=step_seconds)
        if self.monitor.tracker is not None and self.monitor.tracker.panel is not None:
            self.stop.notice = ON_PANEL
        if self.owes_evaluation:
            self.evaluate()
        if begins:
            self.evaluator.before(self.micro_batches.size)
        while state.step < self.steps and not self.stop.agreed(state.step):
            clock.start()
            loss, norm = self.update(state.step)
            self.advance()
            self.checkpoints.writing.poll()
            if self.is_due("tracking"):
                self.monitor.check(self.checkpoints.durable_step)
                self.monitor.record(loss)
                seconds = clock.stop(state.step)
                self.monitor.log(loss, norm, seconds, self.step_flops / seconds / self.peak_flops)
            else:
                clock.pause()
            began = time.perf_counter()
            if self.is_due("checkpoint") or self.evaluation_due:
                in_background = state.step < self.steps and not self.evaluation_due
                self.checkpoints.save(evaluation_due=self.evaluation_due, in_background=in_background)
            if self.owes_evaluation:
                self.evaluate()
            paused, written = time.perf_counter() - began, self.checkpoints.writing.longest
            if self.length.revise(state.step, paused, written) and self.monitor.tracker is not None:
                self.monitor.tracker.plan(self.steps)
        if state.step < self.steps:
            self.checkpoints.save(evaluation_due=self.evaluation_due, in_background=False)
            self.length.save()
            where = f"after step {state.step} of {self.steps}"
            raise StoppedError(f"stopped ({self.stop}) {where}; everything is saved, the same command resumes")

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Do update `step`, counted from 0; mean loss (nats a token) and norm of the gradient, of the whole group."""
        self.state.model.sampled = self.softmax.at(step)
        if self.checkpoints.taught_by:
            self.state.model.teachers_share = teachers.share(self.recipe.train, self.length.lr_factor(step))
        if self.recipe.train.shallow and self.context.parts.model is None:
            self.state.model.model.depth = self.depth(step)
        sums = self.micro_batches.accumulate(step, self.gradient_step.accumulate)
        return self.gradient_step.apply(sums, self.length.lr_factor(step))

    def depth(self, step: int) -> int:
        """Blocks that update `step` trains: the first half during a shallow start, otherwise all.

        All, too, where the second half may not be the identity: after `from`, and in a caller's own model.
        """
        layers, fresh = self.recipe.model.layers, self.recipe.from_ is None and self.context.parts.model is None
        return -(-layers // 2) if fresh and step < self.length.shallow_steps() else layers

    def advance(self) -> None:
        """Count the update that was just done."""
        self.state.step += 1
        self.evaluator.metrics = {}
        if self.state.step == self.steps:
            self.length.finish()

    @property
    def steps(self) -> int:
        """Updates of the whole run, as planned by now."""
        return self.length.steps(self.state.step)

    def is_due(self, what: str) -> bool:
        """Whether this step is one of every `what`.every, or the last."""
        return self.state.step == self.steps or self.state.step % getattr(self.recipe, what).every == 0

    @property
    def evaluation_due(self) -> bool:
        """Whether the run is evaluated after this step. The step at which it begins is left out."""
        watched = self.context.shards.validation.tokens > 0 or bool(self.recipe.evaluate.prompts)
        return watched and self.state.step > self.recipe.from_step and self.is_due("evaluate")

    @property
    def owes_evaluation(self) -> bool:
        """Whether this step's checkpoint still lacks the evaluation that is due."""
        return self.checkpoints.saved == self.state.step and self.evaluation_due and not self.evaluator.metrics

    def evaluate(self) -> None:
        self.evaluator.evaluate(self.micro_batches.size)
        tracker = self.monitor.tracker
        if tracker is not None and tracker.evaluations and self.state.step == self.steps:
            vocab_size = self.context.tokenizer.vocab_size
            tracker.say(hints.of_run(self.recipe, tracker.evaluations, vocab_size))
        self.checkpoints.complete()

    # ------------------------------------------------------------------ what a step costs

    @cached_property
    def peak_flops(self) -> float:
        """Operations a second of this machine's own matrix product, in the type that the model is multiplied in."""
        device, dtype = self.context.device, DTYPES[self.context.settings.precision]
        for size in (8192, 4096, 2048) if device.type != "cpu" else ():
            if (flops := within_memory(partial(measured_flops, device, dtype, size))) is not None:
                return flops
        return measured_flops(device, dtype, 1024)

    @property
    def step_flops(self) -> float:
        """Operations of the last step on each rank."""
        covered = cost.covered(self.recipe.train, self.context.tokenizer.vocab_size)
        depth = self.depth(self.state.step - 1)
        each = cost.flops_per_token(replace(self.recipe.model, layers=depth), covered)
        each += sum(cost.flops_per_token(teacher.shape, covered) // 3 for teacher in self.checkpoints.taught_by)
        return each * self.recipe.train.tokens_per_step / process.world()

    def costs(self) -> tuple[cost.Memory, cost.Traffic]:
        """By formula: bytes that the first rank holds, and bytes that each sends a step."""
        recipe, split = self.recipe, self.context.sharding
        muon, vocab_size = recipe.train.optimizer == "muon", self.context.tokenizer.vocab_size
        traffic = cost.traffic(
            recipe.model,
            vocab_size,
            muon=muon,
            shard_size=split.shard_size,
            replica_size=split.replica_size,
            micro_batches=self.micro_batches.windows // self.micro_batches.size,
            gathered=split.dtype.itemsize,
            orthogonalised=self.context.orthogonalise_in.itemsize,
            exact=self.context.settings.exact,
            prefixes=self.context.shares_with_prefixes and self.state.step < PREFIX_STEPS,
        )
        return cost.memory(recipe.model, vocab_size, muon=muon, shard_size=split.shard_size), traffic


class StepClock:
    """Measures seconds per step, leaving out logging, evaluating and saving between steps."""

    def __init__(self, step: int) -> None:
        self.seconds, self.since = 0.0, step

    def start(self) -> None:
        self.began = time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.began

    def stop(self, step: int) -> float:
        """Mean over the steps since the last stop."""
        self.pause()
        each = self.seconds / (step - self.since)
        self.seconds, self.since = 0.0, step
        return each


def new_state(context: RunContext) -> TrainState:
    """Model, sharded as it is built, and optimizer at step 0."""
    recipe, sharding_, device = context.recipe, context.sharding, context.device
    family = hf_config.family_of(recipe, checkpoint.folders(context.folder))
    with device:
        model = (context.parts.model or Transformer)(
            recipe.model, context.tokenizer.vocab_size, recipe.seed, sharding_.shard_module, family
        )
    if frozen := next((name for name, p in model.named_parameters() if not p.requires_grad), None):
        raise RecipeError(f"model=: {frozen} does not require a gradient: make it a buffer")
    if odd := next((f"{name} is {p.dtype}" for name, p in model.named_parameters() if p.dtype != torch.float32), None):
        raise RecipeError(f"model=: {odd}: make it torch.float32; machine.precision sets the type of products")
    prefixes = torch.tensor(context.tokenizer.prefixes(), device=device) if context.shares_with_prefixes else None
    if prefixes is not None:
        model.start_with_prefixes(prefixes)
        model.start_with_bias(recipe.train.learning_rate)
    sharding_.shard_module(model, root=True)
    model.model.recompute = context.settings.recompute
    compile_loss(False)  # until the blocks are compiled
    optimizer = (context.parts.optimizer or Optimizer)(model, recipe.train, context.orthogonalise_in, sharding_)
    if prefixes is not None:
        optimizer.share_with_prefixes(prefixes)
    scale = torch.tensor(FP16_SCALE if context.settings.precision == "fp16" else 1.0, device=device)
    return TrainState(model, optimizer, scale, torch.zeros((), device=device))


def wrap(context: RunContext, model: Transformer) -> Any:
    """The model in DDP; as it is where it is sharded."""
    if context.sharding.sharded:
        return model
    # Says where the model is: to find that out, accelerate would import all of torch's sharded tensors.
    return context.accelerator.prepare_model(model, device_placement=True)
