"""When to stop: signals, machine.stop_after, and a person's second Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from llm.distributed import process
from llm.distributed.coordinator import Coordinator

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # each asks to finish the step, save and stop
OUT_OF_TIME = 1 << 20  # larger than any signal
NOTICE = b"\nasked to stop: finishing the step and saving ...\n"
ON_PANEL = b"\r\x1b[2K" + NOTICE.strip()  # over the last line of a panel, whose cursor must stay there


class StopRequest:
    """Whether this run was asked to stop, by what, and whether all ranks know."""

    def __init__(self, coordinator: Coordinator, hours: float, at_step: int) -> None:
        """Stop after `hours` (0: never), or when `at_step` updates are done (-1: never)."""
        self.coordinator, self.hours, self.at_step = coordinator, hours, at_step
        self.reason, self.notice = 0, NOTICE  # a signal, or OUT_OF_TIME; the answer to a signal
        self.began = time.monotonic()
        self.asked_at: float | None = None  # when a signal first came to this process

    def agreed(self, step: int) -> bool:
        """True if any rank was asked to stop (maximum over gloo; no device sync)."""
        if self.hours and time.monotonic() - self.began > self.hours * 3600:
            self.reason = self.reason or OUT_OF_TIME
        if step == self.at_step:
            self.reason = self.reason or signal.SIGTERM
        # A signal may come while this rank waits for the others: it is kept, and agreed on after the next step.
        if agreed := self.coordinator.largest(self.reason, after=f"step {step}"):
            self.reason = agreed
        return agreed > 0

    def __str__(self) -> str:
        return "machine.stop_after" if self.reason == OUT_OF_TIME else signal.Signals(self.reason).name

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGNALS inside the block, and put back the handlers that were there."""
        if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
            yield
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # nohup ignores SIGHUP, and the run keeps to that.
        hung_up = getattr(signal, "SIGHUP", None)
        numbers = [n for n in numbers if n != hung_up or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the request; a second Ctrl-C from a person leaves at once.

        A launcher forwards Ctrl-C to children that already had it from the terminal, and its death arrives as
        SIGTERM: neither is a person.
        """
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at, self.reason = now, self.reason or number
            if process.rank() == 0:
                with suppress(OSError):  # the terminal itself may be gone
                    os.write(2, self.notice)
        elif number == signal.SIGINT and now - self.asked_at > 1:
            raise KeyboardInterrupt
