"""train.hours: a run that ends at a time instead of at a step.

How many steps that allows is estimated anew now and then, from the speed that the run shows. Each revision of the plan
is on the disk before it takes effect, so that the learning rate stays a function of the step and of what is recorded: a
run that was killed goes on along the same plan, and a copy of a finished run's record replays it to the bit. Steps that
a kill lost are done again within the time, as long as that reaches; what was planned is followed in any case.
"""

import time
from collections import deque
from typing import Any

from llm.base.errors import RefusedError
from llm.optim.schedule import planned

RECORD = "plan.json"  # in the run
LOOKS = 64  # in the whole time, at which the plan may be revised
WINDOW = 8  # looks over which the speed is measured


class TimeBudget:
    """The time of a run: `hours` for steps, evaluations and checkpoints, without preparation and pauses."""

    def __init__(self, hours: float) -> None:
        self.hours, self.seconds = hours, hours * 3600
        self.plan: list[tuple[int, int]] = []
        self.before = 0.0  # seconds that were spent before this start
        self.finished = False
        self.aside, self.tail = 0.0, 0.0  # seconds of evaluations and checkpoints: all since the start, the longest
        self.looks: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds of steps alone, and steps, of this start

    def take(self, record: dict[str, Any]) -> None:
        """Go on along a record. RefusedError where it is of another time."""
        if record["hours"] != self.hours:
            raise RefusedError(
                f"{RECORD} is of train.hours = {record['hours']:g}, this recipe says {self.hours:g}: "
                "take another run=NAME"
            )
        self.plan = [(int(step), int(steps)) for step, steps in record["plan"]]
        self.before, self.finished = float(record["seconds"]), bool(record["finished"])

    def record(self) -> dict[str, Any]:
        return {"hours": self.hours, "plan": self.plan, "seconds": self.spent(), "finished": self.finished}

    def begin(self, step: int, step_seconds: float) -> None:
        """Start the clock before update `step`; plan by an estimate where nothing is planned yet."""
        self.started, self.first, self.looked = time.monotonic(), step, self.before
        self.plan = self.plan or [(step, step + max(1, int((self.seconds - self.before) / step_seconds)))]

    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.before + time.monotonic() - self.started

    def proposal(self, step: int) -> int:
        """Steps that the run shall have in all, where it is time for a look before update `step`; else 0."""
        spent = self.spent()
        overdue = spent >= self.seconds and step < planned(step, self.plan)
        if self.finished or step <= self.plan[-1][0] or not (overdue or spent - self.looked >= self.seconds / LOOKS):
            return 0
        self.looked = spent
        stepping = spent - self.before - self.aside
        self.looks.append((stepping, step))
        since, first = self.looks[0]
        if step == first:  # the first steps of a start are slower than others: the speed is measured from here on
            return step + 1 if overdue else planned(step, self.plan)
        each = (stepping - since) / (step - first) + self.aside / (step - self.first)
        return step + max(1, int((self.seconds - spent - self.tail) / each))

    def revise(self, step: int, steps: int) -> None:
        """Let the run have `steps` from update `step` on."""
        if steps != planned(step, self.plan):
            self.plan.append((step, steps))

    def paused(self, seconds: float) -> None:
        """An evaluation or a checkpoint, or both, took so long."""
        self.aside += seconds
        self.tail = max(self.tail, seconds)
