"""How many steps the run has: the recipe's number, or a plan that train.hours revises as the speed shows."""

import math
from typing import Any

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.distributed import process
from llm.optim.schedule import StepPlan, lr_factor, planned
from llm.optim.time_budget import RECORD as PLAN
from llm.optim.time_budget import TimeBudget
from llm.run_folder.checkpoint import still_there
from llm.training.context import RunContext


class Length:
    """The plan of steps. Under train.hours every revision is on disk before it takes effect."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        hours = context.recipe.train.hours
        self.budget = TimeBudget(hours) if hours else None

    @property
    def plan(self) -> StepPlan:
        return self.budget.plan if self.budget is not None else [(0, self.context.recipe.train.steps)]

    def steps(self, step: int) -> int:
        """Updates of the whole run, as planned when `step` of them are done; 0 if nothing is planned yet."""
        return planned(step, self.plan) if self.plan else 0

    def shallow_steps(self) -> int:
        """Updates that train the first half of the blocks: train.shallow, but at most half of the run as planned then.

        A later plan never goes back to half of the blocks.
        """
        ends = [*(begin for begin, _ in self.plan[1:]), math.inf]
        halves = ((max(begin, steps // 2), end) for (begin, steps), end in zip(self.plan, ends, strict=False))
        return min([self.context.recipe.train.shallow, *(half for half, end in halves if half < end)])

    def lr_factor(self, step: int) -> float:
        train = self.context.recipe.train
        return lr_factor(step, plan=self.plan, warmup=train.warmup, decay=train.decay)

    def begin(self, step: int, step_seconds: float) -> None:
        """Start the clock before update `step`, with a first plan from an estimate of the main rank."""
        if self.budget is not None:
            self.budget.begin(step, self.context.coordinator.from_main("step", step_seconds))
            self.save()

    def revise(self, step: int, paused: float, written: float) -> bool:
        """Plan anew where that is due, after `paused` seconds of evaluating and saving; true if the plan changed.

        `written`: seconds of the longest background write, which the last checkpoint will have to wait for.
        """
        if self.budget is None:
            return False
        self.budget.paused(paused, written)
        proposed = self.budget.proposal(step) if process.rank() == 0 else 0
        steps = self.context.coordinator.largest(proposed)
        if steps:
            self.budget.revise(step, steps)
            self.save()
        return steps > 0

    def finish(self) -> None:
        if self.budget is not None:
            self.budget.finished = True
            self.save()

    def save(self) -> None:
        coordinator = self.context.coordinator
        if self.budget is not None:
            with coordinator.error_barrier():
                if coordinator.writes:
                    with still_there(self.context.folder):
                        atomic_io.write_checksummed(self.context.folder / PLAN, self.budget.record())

    def record(self) -> dict[str, Any] | None:
        return self.budget.record() if self.budget is not None else None

    def refuse_gap(self, step: int, *, resumed: bool) -> None:
        """RefusedError unless the plan goes on from `step`, where this start begins."""
        if not self.plan:
            return
        begin, (_, last) = self.plan[0][0], self.plan[-1]
        if step < begin or (not resumed and step >= self.steps(step)):
            fault = f"{self.context.folder / PLAN} plans steps {begin + 1:,} to {last:,}"
            odd = f"which do not go on from step {step:,}, where this run begins"
            raise RefusedError(f"{fault}, {odd}: it is another run's plan, remove it")

    def resume(self, saved: dict[str, Any] | None) -> None:
        """Take up the plan of the run folder, else the one that its checkpoint `saved`."""
        if self.budget is None:
            return
        path = self.context.folder / PLAN
        if path.exists():
            try:
                kept = atomic_io.read_checksummed(path)
                saved = {**kept, "seconds": max(kept["seconds"], saved["seconds"] if saved else 0)}
            except RefusedError as error:
                process.warn(f"{error}; using the plan that the checkpoint holds")
        if record := self.context.coordinator.from_main("plan", saved):
            self.budget.take(record)
