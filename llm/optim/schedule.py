"""Learning rate as a function of the step: warm up, hold, decay. No scheduler object, so nothing to save."""

from collections.abc import Sequence
from typing import TypeAlias

StepPlan: TypeAlias = Sequence[tuple[int, int]]
"""Pairs (step, steps): from update `step` on, the run was planned to have `steps`. Without a budget: (0, steps)."""


def planned(step: int, plan: StepPlan) -> int:
    """Total number of updates, as planned before update `step`."""
    return [steps for begin, steps in plan if begin <= step][-1]


def lr_factor(step: int, *, plan: StepPlan, warmup: int, decay: float) -> float:
    """Factor in 0 .. 1 on the learning rate of update `step`.

    Rises linearly from 1/warmup to 1 in the first `warmup` updates, then stays at 1, then falls linearly over the last
    fraction `decay` of the run. The factor of the update after the last would be 0.
    """
    steps = planned(step, plan)
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling_steps = (steps - plan[0][0]) * decay
    falling = (steps - step) / (falling_steps + 1) if falling_steps else 1.0
    return max(0.0, min(1.0, rising, falling))
