"""A person at a terminal: a paste is one prompt, keys edit the line, Ctrl-C ends an answer and then the shell."""

import codecs
import json
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path

import pytest
import torch

from llm.base.errors import RecipeError
from llm.inference.sampling import Sampling
from llm.training.evaluation import SAMPLE_TOKENS
from tests.forks import run, script, train, write_recipe, write_text

PASTED = "The river rises.\n\nIt flows to the sea,\n\n  and on."


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("sample")
    sizes = {"model.context": 256, "train.tokens_per_step": 512, "train.steps": 3, "train.warmup": 0}
    recipe = write_recipe(here, write_text(here / "text.txt"), **sizes, **{"evaluate.prompts": "[The river]"})
    assert run(train(recipe), here).status == 0
    return here


class Terminal:
    """A child at the other end of a pseudo-terminal."""

    def __init__(self, act: Callable[[], None], folder: Path) -> None:
        self.end, other = pty.openpty()
        # One read may end within a letter of several bytes.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.child, self.said, self.last = os.fork(), "", time.monotonic() + 30
        if self.child == 0:
            try:
                os.close(self.end)  # or the terminal would outlive its reader
                os.setsid()
                ioctl(other, termios.TIOCSCTTY, 0)
                for number in (0, 1, 2):
                    os.dup2(other, number)
                sys.stdin = open(0, closefd=False)  # noqa: SIM115
                sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ["TERM"] = "xterm"
                os.chdir(folder)
                torch.set_num_threads(1)
                act()
            except SystemExit as leave:
                os._exit(leave.code if isinstance(leave.code, int) else 0)
            finally:
                os._exit(1)
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self.end, text.replace("\n", "\r").encode())

    def until(self, pattern: str) -> str:
        """What is said up to where `pattern` stands; the rest is kept."""
        while not (found := re.search(pattern, self.said)):
            assert self.hear(), f"{pattern!r} is not in {self.said!r}"
        said, self.said = self.said[: found.end()], self.said[found.end() :]
        return said

    def hear(self) -> bool:
        """Whether the child still says something, within the time that it has."""
        try:
            if select.select([self.end], [], [], max(0, self.last - time.monotonic()))[0]:
                heard = self.decoder.decode(os.read(self.end, 1 << 16))
                self.said = (self.said + heard).replace("\r\n", "\n")
                return True
        except OSError:  # it has closed its end
            pass
        return False

    def status(self) -> int:
        while self.hear():
            pass
        assert time.monotonic() < self.last, self.said
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@contextmanager
def shell(here: Path, *arguments: str, act: Callable[[], None] | None = None) -> Iterator[Terminal]:
    terminal = Terminal(act or script("module:llm.sample", "tiny", "--seed", "3", *arguments), here)
    try:
        terminal.until("> ")
        yield terminal
    finally:
        with suppress(ProcessLookupError):
            os.kill(terminal.child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(terminal.child, 0)
        os.close(terminal.end)


@pytest.mark.parametrize("marks", [("", "\n"), ("\x1b[200~", "\x1b[201~\n"), ("", "")], ids=["plain", "marked", "open"])
def test_a_pasted_text_is_one_prompt(here: Path, marks: tuple[str, str]) -> None:
    given = run(script("module:llm.sample", "tiny", "--seed", "3", "--tokens", "20", "--prompt", PASTED), here)
    with shell(here, "--tokens", "20") as terminal:
        terminal.type(marks[0] + PASTED + marks[1])
        said = terminal.until("20 tokens in .*\n")
        assert given.out in said
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.status() == 0
        assert "tokens in" not in terminal.said


def test_arrows_move_in_the_line_and_bring_earlier_ones_back(here: Path) -> None:
    with shell(here, "--tokens", "1") as terminal:
        terminal.type("The rver\x1b[D\x1b[D\x1b[Di\n")
        assert "The river" in terminal.until("1 tokens in .*\n")
        terminal.until("> ")
        terminal.type("\x1b[A\n")
        said = terminal.until("1 tokens in .*\n")
        assert "The river" in said and "^[" not in said


def test_ctrl_c_ends_an_answer_and_a_second_one_leaves(here: Path) -> None:
    with shell(here, "--tokens", "1000000", "--seed", "1") as terminal:
        terminal.type("The river\n")
        terminal.until("The river[^>]{50}")
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("not sent")
        terminal.until("not sent")
        time.sleep(0.2)  # readline overlooks a signal that arrives while it handles a key
        terminal.type("\x03")  # the line is dropped, the person stays
        terminal.until("> ")
        time.sleep(0.2)
        terminal.type("\x03")
        assert terminal.status() == 0
        assert "Traceback" not in terminal.said and "interrupted" not in terminal.said


def test_samples_in_training_are_what_sample_says(here: Path) -> None:
    lines = [json.loads(line) for line in (here / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    (told,) = [line["sample"] for line in lines if "sample" in line]
    given = ["tiny/newest", "--prompt", "The river", "--tokens", SAMPLE_TOKENS, "--seed", 1]
    assert run(script("module:llm.sample", *given), here).out == f"The river{told}\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(name, "nan") for name in ("temperature", "top-p", "min-p", "repetition-penalty")],
        *[(name, "inf") for name in ("temperature", "top-p", "min-p", "repetition-penalty")],
        *[(name, "1e-320") for name in ("top-p", "repetition-penalty")],
        ("temperature", "-1e-320"),
        ("top-k", "-1"),
        ("tokens", "-1"),
        ("seed", str(1 << 63)),
    ],
)
def test_a_number_out_of_bounds_is_one_line(here: Path, option: str, value: str) -> None:
    ended = run(script("module:llm.sample", "tiny", "--prompt", "a", f"--{option}={value}"), here)
    assert ended.status == 2 and ended.err.startswith(f"error: --{option} = "), ended.err
    assert len(ended.err.splitlines()) == 1


def test_extreme_numbers_within_the_bounds_give_text(here: Path) -> None:
    def said(**options: str) -> str:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        ended = run(script("module:llm.sample", "tiny", "--prompt", "The", "--tokens=9", "--seed=4", *given), here)
        assert ended.status == 0, ended.err
        return ended.out

    greedy = said(temperature="0")
    assert {said(temperature=cold) for cold in ("1e-320", "5e-324", "-0.0", "1e-38", "1e-30")} == {greedy}
    assert said(top_p="1e-9") == said(min_p="1") == greedy
    assert said(min_p="1e-320") == said(min_p="0") and said(top_k=str(10**30)) == said(top_k="0")
    for name, value in (("temperature", "1e6"), ("repetition_penalty", "1e-6"), ("repetition_penalty", "1e6")):
        assert said(**{name: value})


def test_the_bounds_hold_for_those_who_call_it_too() -> None:
    with pytest.raises(RecipeError, match="temperature = nan"):
        Sampling(temperature=float("nan"))


def test_a_shell_whose_text_goes_to_a_file_asks_on_the_terminal(here: Path) -> None:
    def act() -> None:
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        script("module:llm.sample", "tiny", "--tokens", "3", "--seed", "3")()

    with shell(here, act=act) as terminal:
        terminal.type("The river\n")
        terminal.until("3 tokens in .*\n")
        terminal.until("> $")
        terminal.type("\x04")
        assert terminal.status() == 0
    given = run(script("module:llm.sample", "tiny", "--tokens=3", "--seed=3", "--prompt=The river"), here)
    assert (here / "said.txt").read_text() == given.out


def test_a_text_ends_before_what_it_shall_stop_at(here: Path) -> None:
    def said(*given: object) -> str:
        ended = run(script("module:llm.sample", "tiny", "--seed=2", "--tokens=60", *given), here)
        assert ended.status == 0, ended.err
        return ended.out.removesuffix("\n")

    def piped(name: str) -> str:
        def act() -> None:
            sys.stdin = Path(name).open()  # noqa: SIM115
            script("module:llm.sample", "tiny", "--seed=2", "--tokens=60")()

        return run(act, here).out.removesuffix("\n")

    hot = ("--temperature=3", "--min-p=0", "--repetition-penalty=1", "--tokens=200", "--prompt", "The river")
    letter = next(each for each in said(*hot) if ord(each) > 127)
    in_ascii = letter.encode().decode("ascii", "surrogateescape")  # as it arrives in a locale of ASCII alone
    assert letter not in said(*hot, "--stop", letter) and said(*hot, "--stop", in_ascii) == said(*hot, "--stop", letter)

    whole = said("--prompt", "The river")
    rest = whole.removeprefix("The river")
    for stop in (rest[10:13], rest[5:6], rest[30:]):
        wanted = "The river" + rest[: rest.index(stop)]
        assert said("--prompt", "The river", "--stop", stop) == wanted
    assert said("--prompt", "The river", "--stop", "\u2603", "--stop", rest[-1] + "\u2603") == whole
    (here / "prompt.txt").write_text("\ufeffThe river\r\n", newline="")  # as some editors write a file
    assert said("--prompt-file", "prompt.txt") == piped("prompt.txt") == whole
    both = said("--prompt", "The river", "--prompt-file", "prompt.txt", "--stop", rest[10:13])
    assert both.count("-" * 40) == 2 and rest[10:13] not in both.replace("The river", "")
    refused = run(script("module:llm.sample", "tiny", "--prompt-file", "nowhere.txt"), here)
    assert refused.status == 2 and "nowhere.txt cannot be read" in refused.err
