"""The live panel of a run on a terminal: curve, figures and last sample, redrawn in place below the run's messages.

It hides no cursor, changes no terminal mode and starts no thread, so that nothing has to be put back when the process
is killed. Its cost is bounded: the pause between two drawings is at least `PAUSE` times as long as the last one took.
"""

import itertools
import math
import os
import sys
import time
from typing import Any

from rich.box import ROUNDED
from rich.console import Console
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llm.base.durations import readable

PAUSE = 200  # times what a drawing takes: at most 0.5 % of the time
LEAST = (60, 16)  # columns and rows of a terminal that has room for it
WIDEST = 120
FIGURES = 23  # columns
HEIGHT = 8  # rows of the curve
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a Braille letter, by column and row
MARK = 0x100  # a cell with an evaluation in it
KEPT = 4000  # points of the curve, the older ones thinned


class _Console(Console):
    """A console that leaves the cursor visible, and whose broken pipe is an OSError, not the end of the process."""

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Panel:
    """The panel of the run `name`. Every method may raise OSError or ValueError where the console is gone."""

    def __init__(self, name: str, lines: list[dict[str, Any]], first: int = 0, console: Console | None = None) -> None:
        """`lines`: the run's record so far. It began after step `first`, where an evaluation is of no checkpoint.

        `console` is the terminal unless a test has its own.
        """
        self.name, self.first, self.last, self.sample = name, first, dict[str, Any](), Text()
        self.train, self.validation = list[tuple[int, float]](), list[tuple[int, float]]()
        self.unit = 1.0  # bits per byte of a nat per token; nats are shown until it is known
        self.console = console or _Console(highlight=False, markup=False, emoji=False)
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        self.next_drawing = 0.0
        for line in lines:
            self.take(line)

    def take(self, line: dict[str, Any]) -> None:
        """Remember a line of the record, without drawing it."""
        if bytes_per_token := line.get("bytes_per_token"):
            self.unit = 1 / bytes_per_token / math.log(2)
        if (loss := line.get("loss")) is not None and math.isfinite(loss):
            self.train.append((line["step"], loss))
            if len(self.train) > KEPT:
                del self.train[: KEPT // 2 : 2]
        if line.get("bits_per_byte") is not None:
            self.validation.append((line["step"], line["bits_per_byte"]))
        if "sample" in line:
            self.sample = Text.assemble((_printable(line["prompt"]), "bold"), "|", _printable(line["sample"]))
        self.last |= line

    def draw(self, steps: int, *, now: bool = False) -> None:
        """Draw the panel of a run of `steps` steps, or do nothing if the last drawing is too recent and not `now`."""
        began = time.perf_counter()
        if now or began >= self.next_drawing:
            self.live.start()
            self.live.update(self.frame(steps), refresh=True)
            self.next_drawing = time.perf_counter() + PAUSE * (time.perf_counter() - began)

    def say(self, text: str) -> None:
        """Print a line above the panel."""
        self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the last drawing on the screen, and the cursor below it."""
        self.live.stop()

    def frame(self, steps: int) -> Frame:
        """The panel: three columns narrower than the console, so that the echo of Ctrl-C does not wrap."""
        width, step = min(self.console.width - 3, WIDEST), self.last.get("step", 0)
        unicode = self.console.encoding.startswith("utf")
        body = Table.grid(padding=(0, 2), expand=True)
        body.add_column(width=FIGURES)
        body.add_column(ratio=1)
        body.add_row(self._figures(), self._curve(steps, width - FIGURES - 8, unicode))
        whole = Table.grid(expand=True)
        whole.add_row(ProgressBar(total=max(steps, 1), completed=step))
        whole.add_row(body)
        if self.sample:
            sample = self.sample.copy()
            sample.truncate(3 * (width - 4) - 2, overflow="ellipsis" if unicode else "crop")
            whole.add_row(sample)
        left = f"{readable(self.last['seconds_left'])} left" if "seconds_left" in self.last else ""
        title = f"{self.name}  step {step:,}/{steps:,}  {step / max(steps, 1):.0%}  {left}".rstrip()
        return Frame(whole, title=Text(title, "bold"), title_align="left", box=ROUNDED, width=width)

    def _figures(self) -> Table:
        last, table = self.last, Table.grid(padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(justify="right")
        best = min((bits for step, bits in self.validation if step != self.first), default=None)
        for name, value, form in (
            ("training loss", last.get("loss"), "{:.4f}"),
            ("bits per byte", last.get("bits_per_byte"), "{:.4f}"),
            ("  best", best, "{:.4f}"),
            ("gradient", last.get("gradient_norm"), "{:.2f}"),
            ("tokens/s", last.get("tokens_per_second"), "{:,.0f}"),
            ("utilisation", last.get("utilisation"), "{:.0%}"),
            ("memory", last.get("memory"), ""),
            ("epochs", last.get("epoch"), "{:.2f}"),
        ):
            shown = form.format(value) if form and value is not None else f"{value / 1e6:,.0f} MB" if value else "-"
            table.add_row(name, shown)
        return table

    def _curve(self, steps: int, width: int, unicode: bool) -> Text:
        """Training loss (in bits per byte where that is known) and validation, over all steps of the run."""
        train = [(step, loss * self.unit) for step, loss in self.train]
        validation = self.validation if self.unit != 1.0 else []
        settled = [value for _, value in [*train[len(train) // 10 :], *validation]]
        if not settled:
            return Text("\n" * (HEIGHT - 1))
        low, high = min(settled), max(settled)
        span, labels = (high - low) or 1.0, 7
        columns, dots = max(1, width - labels), (2, 4) if unicode else (1, 1)

        def dot(cell: int) -> str:
            if unicode:
                return "●" if cell == MARK else chr(0x2800 + cell) if cell else " "
            return "o" if cell == MARK else "." if cell else " "

        grid = [[0] * columns for _ in range(HEIGHT)]

        def place(step: int, value: float) -> tuple[int, int]:
            across = int(step / max(steps, 1) * columns * dots[0])
            down = round((high - value) / span * (HEIGHT * dots[1] - 1))
            return min(across, columns * dots[0] - 1), min(max(down, 0), HEIGHT * dots[1] - 1)

        for x, y in itertools.starmap(place, train):
            grid[y // dots[1]][x // dots[0]] |= DOTS[x % dots[0]][y % dots[1]]
        for x, y in itertools.starmap(place, validation):
            grid[y // dots[1]][x // dots[0]] = MARK
        lines = []
        for row, cells in enumerate(grid):
            at = {0: f"{high:6.3f} ", HEIGHT - 1: f"{low:6.3f} "}.get(row, " " * labels)
            line = Text.assemble((at, "dim"))
            for cell, same in itertools.groupby(cells):
                line.append((dot(cell)) * len(list(same)), "bold" if cell == MARK else "cyan")
            lines.append(line)
        key = f"{dot(MARK)} validation  " if validation else ""
        unit = "bits per byte" if self.unit != 1.0 else "nats per token"
        lines.append(Text(f"{key}{dot(0x12)} training  ({unit})", "dim"))
        return Text("\n").join(lines)


def has_room() -> bool:
    """Whether standard output is a terminal that is large enough and can move its cursor."""
    try:
        if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            return False
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or a stand-in for a terminal
        return False
    return size.columns >= LEAST[0] and size.lines >= LEAST[1]


def _printable(text: str) -> str:
    """The text on one line, without characters that would act on the terminal."""
    return "".join(each if each.isprintable() else " " for each in " ".join(text.split()))
