"""Background work: one job at a time, in a thread of low priority.

Only the main thread communicates. A job that ranks do together is split into parts; between parts, `poll` or `wait`
synchronises the ranks and raises one rank's error on all of them.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread, get_native_id

from llm.distributed.coordinator import Coordinator

Part = Callable[[], None]
NICE = 10


class BackgroundWork:
    """`begin`, `poll` and `wait` are called by all ranks alike; `close` by each for itself."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        # Set when the part that is under way is done; None: there is none. Python takes a thread whose `join` was
        # interrupted for one that has ended.
        self.done: Event | None = None
        self.rest: list[Part] = []
        self.error: BaseException | None = None
        self.longest = 0.0  # seconds of a part
        self.abandon: Part
        self.hurry: Part

    def begin(self, parts: Sequence[Part], *, abandon: Part, hurry: Part) -> None:
        """Start the first of `parts`; the work before must have ended.

        `abandon` undoes what was done when a part has failed; `hurry` lets the part that is under way end soon.
        """
        assert self.done is None
        self.rest, self.abandon, self.hurry = list(parts), abandon, hurry
        self._next()

    def poll(self) -> None:
        """Go on to the next part if all ranks have done theirs. Raises an error of this or of another rank."""
        if self.done is not None and not self.coordinator.largest(not self.done.is_set()):
            self._conclude(self.done)

    def wait(self) -> None:
        """Wait until all is done, on all ranks. Raises an error of this or of another rank."""
        while self.done is not None:
            self._conclude(self.done)

    def close(self) -> None:
        """Wait for this rank's part without a word to the others, which may be gone. Raises its error.

        Interrupted, it hurries the part and waits for it all the same: no thread outlives this.
        """
        if self.done is None:
            return
        try:
            self.done.wait()
        except BaseException:
            self.hurry()
            self.done.wait()
            raise
        finally:
            self.done = None
            if self.error is not None and not self.rest:  # otherwise other ranks may still be at work on it
                self.abandon()
        self._raise()

    def _next(self) -> None:
        self.done = Event()
        Thread(target=self._do, args=[self.rest.pop(0), self.done], daemon=True).start()

    def _do(self, part: Part, done: Event) -> None:
        began = time.perf_counter()
        try:
            if sys.platform == "linux":  # where a thread has a priority of its own
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)
            part()
        except BaseException as error:  # raised again in the main thread
            self.error = error
        self.longest = max(self.longest, time.perf_counter() - began)
        done.set()

    def _conclude(self, done: Event) -> None:
        """See the part to its end, on all ranks, and begin the next."""
        done.wait()
        self.done = None
        try:
            with self.coordinator.error_barrier():
                self._raise()
        except BaseException:
            self.abandon()
            raise
        if self.rest:
            self._next()

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error
