"""Learning rate as a function of the step: warm up, hold, decay. No scheduler object, so nothing to save."""


def rate_share(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Share of the full learning rate that update `step` (0 .. steps - 1) uses, in 0 .. 1.

    Linear from 1/warmup up to 1 in the first `warmup` updates, then 1, then linear towards 0 over the last `decay` of
    the run: the last update still moves, the one after it would not.
    """
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling_steps = steps * decay
    falling = (steps - step) / (falling_steps + 1) if falling_steps else 1.0
    return max(0.0, min(1.0, rising, falling))
