"""The live panel: it fits its terminal, shows what the record holds, costs little, and leaves the terminal as it was."""

import json
import os
import re
import signal
import struct
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from llm.run_folder import panel
from llm.run_folder.panel import Panel
from tests.forks import digest, run, train, write_recipe, write_text
from tests.test_sample import Terminal
from tests.test_watching import during

PROMPT = "My self Har"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def recipe_of(folder: Path, text: Path, **changes: object) -> Path:
    return write_recipe(folder, text, **{"evaluate.prompts": f"[{PROMPT}]", **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(train(recipe_of(folder, text)), folder).status == 0
    return folder


def on_terminal(act: Callable[[], None], folder: Path, columns: int = 80, rows: int = 40, **variables: str) -> Terminal:
    def sized() -> None:
        ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.environ.pop("LINES", None)
        os.environ.update(variables)
        act()

    terminal = Terminal(sized, folder)
    terminal.last = time.monotonic() + 120
    return terminal


def screen_of(said: str, columns: int, rows: int = 40) -> Any:
    """The screen after all of `said`, the lines that scrolled off included, as a terminal would show it."""
    pyte = pytest.importorskip("pyte", reason="install the extra `test`")
    screen = pyte.Screen(columns, 400)
    screen.set_mode(pyte.modes.LNM)  # the newlines were translated as they were read
    pyte.Stream(screen).feed(said)
    return screen


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_its_terminal_and_shows_what_the_record_holds(
    tmp_path: Path, text: Path, whole: Path, columns: int
) -> None:
    terminal = on_terminal(train(recipe_of(tmp_path, text)), tmp_path, columns)
    assert terminal.status() == 0, terminal.said
    screen = screen_of(terminal.said, columns)
    lines = [line.rstrip() for line in screen.display]
    assert not screen.cursor.hidden and "\x1b[?25l" not in terminal.said and "\x1b[?1049" not in terminal.said
    starts = [at for at, line in enumerate(lines) if line.startswith("╭")]
    assert len(starts) == 1 and "step 12/12  100%" in lines[starts[0]], "one panel is left, the last"
    shown = re.sub(" +", " ", "\n".join(lines[starts[0] :]))  # figures stand to the right, however wide the widest is
    record = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(record) if "loss" in line)
    best = min(line["bits_per_byte"] for line in record if "bits_per_byte" in line)
    for figure in (f"training loss {last['loss']:.4f}", f"bits per byte {best:.4f}", f"{last['gradient_norm']:.2f}",
                   f"{last['memory'] / 1e6:,.0f} MB", f"{PROMPT}|", "● validation"):  # fmt: skip
        assert figure in shown, figure
    panelled = [line for line in lines if line and line[0] in "╭│╰"]
    sure = panelled[: panelled.index(next(line for line in panelled if f"{PROMPT}|" in line))]  # letters of one width
    assert {cell_len(line) for line in [*sure, panelled[-1]]} == {columns - 3} and 12 < len(panelled) < 24
    assert any("Saved in " in line for line in lines)
    said = "\n".join(lines)
    assert said.count("bits per byte\n") == 3 and not re.search(r"step +\d+/12 +loss", said)
    assert digest(tmp_path) == digest(whole)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"rows": "10"}])
def test_a_terminal_without_room_gets_plain_lines(tmp_path: Path, text: Path, variables: dict[str, str]) -> None:
    rows = int(variables.pop("rows", 40))
    terminal = on_terminal(train(recipe_of(tmp_path, text)), tmp_path, rows=rows, **variables)
    assert terminal.status() == 0 and "╭" not in terminal.said
    assert len(re.findall(r"step +\d+/12 +loss", terminal.said)) == 12


def test_ctrl_c_saves_and_leaves_the_terminal_as_it_was(tmp_path: Path, text: Path) -> None:
    def wait() -> None:
        (tmp_path / "training").touch()
        time.sleep(2)

    terminal = on_terminal(during(recipe_of(tmp_path, text), 3, wait), tmp_path)
    before = termios.tcgetattr(terminal.end)
    while not (tmp_path / "training").exists():
        time.sleep(0.01)
    terminal.type("\x03")
    assert terminal.status() == 75, terminal.said
    assert termios.tcgetattr(terminal.end) == before
    screen = screen_of(terminal.said, 80)
    said = "\n".join(line.rstrip() for line in screen.display)
    assert not screen.cursor.hidden and "asked to stop" in terminal.said
    assert said.count("╭") == said.count("╰") == 1 and "step 3/12" in said and "after step 3 of 12" in said


def test_an_error_and_a_kill_leave_the_terminal_as_it_was(tmp_path: Path, text: Path) -> None:
    def fails() -> None:
        raise ValueError("the moon is full")

    for act, status in ((fails, 1), (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL)):
        terminal = on_terminal(during(recipe_of(tmp_path, text), 7, act), tmp_path)
        before = termios.tcgetattr(terminal.end)
        assert terminal.status() == status and termios.tcgetattr(terminal.end) == before
        assert not screen_of(terminal.said, 80).cursor.hidden and re.search(r"step \d+/12", terminal.said)


def test_a_terminal_that_goes_away_ends_no_run(tmp_path: Path, text: Path, whole: Path) -> None:
    gone = tmp_path / "gone"

    def wait() -> None:
        (tmp_path / "training").touch()
        while not gone.exists():
            time.sleep(0.01)

    def hung_up() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        during(recipe_of(tmp_path, text), 3, wait)()

    terminal = on_terminal(hung_up, tmp_path)
    while not (tmp_path / "training").exists():
        terminal.last = time.monotonic() + 0.02
        terminal.hear()  # or it would wait for a reader
    os.close(terminal.end)
    gone.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.child, 0)[1]) == 0
    assert digest(tmp_path) == digest(whole)


def frame(width: int, lines: list[dict[str, Any]], encoding: str = "utf-8") -> str:
    """The panel of 100 steps as a terminal of this width and encoding would get it."""
    console = Console(file=StringIO(), width=width, height=40, force_terminal=True, color_system=None)
    type(console).encoding = property(lambda self: encoding)  # type: ignore[assignment]
    try:
        shown = Panel("tiny", lines, console=console)
        console.print(shown.frame(100))
    finally:
        type(console).encoding = ENCODING  # type: ignore[assignment]
    return console.file.getvalue()  # type: ignore[attr-defined]


ENCODING = Console.encoding
LINES = [
    {"step": step, "loss": 9.0 - step / 20, "tokens_per_second": 1e6, "seconds_left": 1e5} for step in range(1, 99)
]


@pytest.mark.parametrize("width", [1, 20, 38, 41, 42])
def test_a_narrow_terminal_gets_a_panel(width: int) -> None:
    assert "tiny" in frame(width, LINES) or width < 10


def test_no_text_of_a_sample_acts_on_the_terminal() -> None:
    sample = {"step": 5, "prompt": "\x1b]0;title\x07", "sample": "[red]a\x1b[2J\x9b31m\u202e" + "b" * 4000}
    said = frame(80, [*LINES, sample])
    assert not re.search("[\x1b\x07\x9b\u202e]", said) and "[red]a" in said and len(said.splitlines()) < 18


def test_it_speaks_ascii_and_takes_numbers_that_are_not_finite() -> None:
    odd = [
        {"step": 3, "loss": None},
        {"step": 4, "loss": float("nan")},
        {"step": 5, "bits_per_byte": 2.0, "val_loss": 3.0},
    ]
    said = frame(80, [{"step": 0, "bytes_per_token": 3.4}, *odd, *LINES], "ascii")
    assert said.isascii() and "o validation" in said
    assert "tiny" in frame(60, []) and "tiny" in frame(60, odd[:2])


def test_drawing_takes_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawing = [0.0], [0.0]

    def slow(self: Panel, steps: int) -> str:
        now[0] += 0.02
        drawing[0] += 0.02
        return "panel"

    monkeypatch.setattr(panel.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Panel, "frame", slow)
    shown = Panel("tiny", [], console=Console(file=StringIO(), force_terminal=True))
    for _ in range(10_000):  # steps of 10 ms, each logged
        now[0] += 0.01
        shown.draw(100)
    shown.close()
    assert drawing[0] / 0.02 > 10 and drawing[0] / now[0] < 0.006
