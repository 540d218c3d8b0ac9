"""Progress of reading and encoding: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from llm.base.durations import readable

Say = Callable[[str], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Show:
    """Progress of a long task: a bar on a terminal, otherwise a line every 10 s; nothing if `progress` is off."""

    say: Say
    progress: bool

    def over(self, items: Iterable[Item], what: str, total: int | None, size: Callable[[Item], int]) -> Iterator[Item]:
        """The same items; `size` gives the bytes of text in one of them, `total` those of all."""
        if self.progress and sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(desc=what, total=total, unit="B", unit_scale=True) as bar:
                for item in items:
                    yield item
                    bar.update(size(item))
            return
        began = told = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += size(item)
            now = time.monotonic()
            if self.progress and now - told >= 10:
                told, rate = now, done / (now - began)
                of = f" of {total / 1e6:,.0f}" if total else ""
                left = f", {readable(max(total - done, 0) / rate)} left" if total and done > total / 1000 else ""
                self.say(f"{what}: {done / 1e6:,.0f}{of} MB{left}, {rate / 1e6:,.1f} MB/s")
