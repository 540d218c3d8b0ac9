"""Watch a run while it trains, and stop it once validation has not improved for a while.

llm.train(llm.load_recipe("quickstart"), on_log=StopEarly(patience=3))  # StoppedError when it stops; all is saved
"""

import signal
from typing import Any


class StopEarly:
    def __init__(self, patience: int) -> None:
        self.patience, self.since_best = patience, 0

    def __call__(self, line: dict[str, Any]) -> None:
        if "val_loss" in line:  # other lines hold a step's loss, a sample or an event
            self.since_best = 0 if line["best"] else self.since_best + 1
            if self.since_best >= self.patience:
                signal.raise_signal(signal.SIGINT)
