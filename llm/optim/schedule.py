"""Learning rate as a function of the step: warm up, hold, decay. No scheduler object, so nothing to save."""

from collections.abc import Sequence
from typing import TypeAlias

StepPlan: TypeAlias = Sequence[tuple[int, int]]
"""Pairs (step, steps): from that update on the run was to have so many. One pair, (0, steps), but under a budget."""


def planned(step: int, plan: StepPlan) -> int:
    """Updates that the run has in all, as known before update `step`."""
    return [steps for begin, steps in plan if begin <= step][-1]


def lr_factor(step: int, *, plan: StepPlan, warmup: int, decay: float) -> float:
    """Share of the full learning rate that update `step` uses, in 0 .. 1.

    Linear from 1/warmup up to 1 in the first `warmup` updates, then 1, then linear towards 0 over the last `decay` of
    the run: the last update still moves, the one after it would not.
    """
    steps = planned(step, plan)
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling_steps = (steps - plan[0][0]) * decay
    falling = (steps - step) / (falling_steps + 1) if falling_steps else 1.0
    return max(0.0, min(1.0, rising, falling))
