"""train.hours: a run that ends after a given time instead of a given step.

The number of steps is re-estimated now and then from the measured speed. Each revision of the plan is written to disk
before it takes effect, so that the learning rate depends only on the step and the record: a killed run resumes with the
same plan, and a copy of a finished run's record replays it bit for bit. Steps lost by a kill are repeated within the
time that is left; a recorded plan is followed in any case.
"""

import time
from collections import deque
from typing import Any

from llm.base.errors import RefusedError
from llm.optim.schedule import planned

RECORD = "plan.json"  # in the run folder
LOOKS = 64  # per run: times at which the plan may be revised
WINDOW = 8  # looks over which the speed is measured


class TimeBudget:
    """A run's plan and clock: `hours` cover steps, evaluations and checkpoints, not preparation or pauses."""

    def __init__(self, hours: float) -> None:
        self.hours, self.seconds = hours, hours * 3600
        self.plan: list[tuple[int, int]] = []
        self.before = 0.0  # seconds spent before this start
        self.finished = False
        self.aside, self.tail = 0.0, 0.0  # seconds of evaluations and checkpoints: sum, longest
        self.looks: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (seconds in steps alone, step) since this start

    def take(self, record: dict[str, Any]) -> None:
        """Continue a recorded plan. RefusedError if its hours differ."""
        if (hours := record["hours"]) != self.hours:
            said = f"{RECORD} is of train.hours = {hours:g}, this recipe says {self.hours:g}"
            raise RefusedError(f"{said}: take another run=NAME")
        self.plan = [(int(step), int(steps)) for step, steps in record["plan"]]
        self.before, self.finished = float(record["seconds"]), bool(record["finished"])

    def record(self) -> dict[str, Any]:
        return {"hours": self.hours, "plan": self.plan, "seconds": self.spent(), "finished": self.finished}

    def begin(self, step: int, step_seconds: float) -> None:
        """Start the clock before update `step`; make a first plan from `step_seconds` if there is none."""
        self.started, self.first, self.looked = time.monotonic(), step, self.before
        self.plan = self.plan or [(step, step + max(1, int((self.seconds - self.before) / step_seconds)))]

    def spent(self) -> float:
        """Seconds used so far."""
        return self.before + time.monotonic() - self.started

    def proposal(self, step: int) -> int:
        """New total number of steps if a look is due before update `step`, otherwise 0."""
        spent = self.spent()
        overdue = spent >= self.seconds and step < planned(step, self.plan)
        if self.finished or step <= self.plan[-1][0] or not (overdue or spent - self.looked >= self.seconds / LOOKS):
            return 0
        self.looked = spent
        stepping = spent - self.before - self.aside
        self.looks.append((stepping, step))
        since, first = self.looks[0]
        if step == first:  # the first steps after a start are slow: measure from here on
            return step + 1 if overdue else planned(step, self.plan)
        each = (stepping - since) / (step - first) + self.aside / (step - self.first)
        return step + max(1, int((self.seconds - spent - self.tail) / each))

    def revise(self, step: int, steps: int) -> None:
        """Plan `steps` in total from update `step` on."""
        if steps != planned(step, self.plan):
            self.plan.append((step, steps))

    def paused(self, seconds: float, written: float = 0.0) -> None:
        """Record the `seconds` of an evaluation or a checkpoint; only the end waits for one to be `written`."""
        self.aside += seconds
        self.tail = max(self.tail, seconds, written)
