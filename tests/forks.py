"""Runs of the product in children of this process, which are forked warm instead of importing torch anew.

A child is a real process: it has its own folder, its arguments, its exit status, and it can be killed.
"""

import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas  # noqa: F401 - a run imports these and, below, `datasets`: seconds in each child
import torch
import torch._dynamo

import llm.data.pipeline
import llm.training.trainer
from llm.data.sources import lean_datasets
from llm.run_folder import checkpoint

lean_datasets()

ROOT = Path(__file__).parent.parent
SENTENCES = ("The river rises in the north and flows to the sea.", "It was founded in 1897 by a society of engineers.",
             "He played for the club until he was thirty-two.", "The species is found in dry forests at some height.",
             "Its capital lies on two hills, and is known for bread.", "My self Har is a saying of the region.")  # fmt: skip


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def write_text(path: Path, documents: int = 60) -> Path:
    """A text of documents that differ, with headings between them."""
    words = " ".join(SENTENCES).split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            chosen = [words[(number * 7 + i * (number + 3)) % len(words)] for i in range(16)]
            file.write(f" = Article {number} = \n\n{SENTENCES[number % len(SENTENCES)]} {' '.join(chosen)}\n\n")
    return path


def write_recipe(folder: Path, text: Path, **changes: object) -> Path:
    """A recipe of a tiny model that is trained in a second, with all switched on. A change to None leaves a key out."""
    keys: dict[str, object] = {
        "run": "tiny", "text.files": f"[{text}]", "text.validation": 0.1, "text.cache": text.parent / "cache", "tokenizer.vocabulary": 320,
        "model.dim": 32, "model.layers": 2, "model.heads": 2, "model.context": 16, "model.dropout": 0.1, "train.steps": 12,
        "train.tokens_per_step": 64, "train.learning_rate": 0.02, "train.warmup": 2, "evaluate.every": 5, "checkpoint.every": 4,
        "checkpoint.keep": 99, "tracking.every": 1, "machine.precision": "fp32", "machine.micro_batch": 2, "machine.threads": 1}  # fmt: skip
    keys = {name: value for name, value in (keys | changes).items() if value is not None}
    path = folder / "recipe.yaml"
    sections: dict[str, list[str]] = {}
    for name, value in keys.items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(f"{'  ' if section else ''}{key}: {value}")
    lines = sections.pop("", [])
    for section, below in sections.items():
        lines += [f"{section}:", *below]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def script(file: Path | str, *arguments: object) -> Callable[[], None]:
    """What runs a script of the project, or `module:NAME` as `python -m` does, with these arguments."""

    def act() -> None:
        sys.argv = [str(file), *map(str, arguments)]
        if str(file).startswith("module:"):
            module = str(file).removeprefix("module:")
            sys.modules.pop(module, None)  # it runs anew, as `python -m` would run it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(file), run_name="__main__")

    return act


def start(act: Callable[[], None], folder: Path, environment: dict[str, str] | None = None, tag: str = "") -> int:
    """Fork a child that does `act` in `folder`; its process id. Output goes to files there."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / f"{name}{tag}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
        os.chdir(folder)
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        act()
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    finally:
        # Whatever happens, a full disk included, a child must never go on as a second pytest.
        for output in (sys.stdout, sys.stderr):
            with suppress(OSError):
                output.flush()
        os._exit(status)


def count_threads() -> None:
    """From now on, only count this child's threads, all the time computing on one.

    OpenMP's threads do not survive a fork: a child whose parent ever computed on two would crash on its own two.
    """
    threads = [torch.get_num_threads()]
    torch.set_num_threads = lambda number: threads.__setitem__(0, number)
    torch.get_num_threads = lambda: threads[0]


def ended(child: int, folder: Path, tag: str = "", seconds: float = 120) -> Ended:
    """Wait for a child; one that takes longer than `seconds` is killed and fails the test."""
    until = time.monotonic() + seconds
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"still running after {seconds} s:\n{(folder / f'err{tag}.txt').read_text()[-2000:]}")
        time.sleep(0.01)
    texts = [(folder / f"{name}{tag}.txt").read_text(encoding="utf-8") for name in ("out", "err")]
    return Ended(os.waitstatus_to_exitcode(found[1]), *texts)


def run(act: Callable[[], None], folder: Path) -> Ended:
    return ended(start(act, folder), folder)


def run_group(act: Callable[[], None], folder: Path, world: int, node: int = 0, seconds: float = 120) -> list[Ended]:
    """The same act in `world` processes that form a group, as torchrun would start them on nodes of `node` processes."""
    children = start_group(act, folder, world, node)
    return [ended(child, folder, "" if world == 1 else f"-{rank}", seconds) for rank, child in enumerate(children)]


def start_group(act: Callable[[], None], folder: Path, world: int, node: int = 0) -> list[int]:
    """Their process ids, at once; output goes to files with a tag for each rank where there are several."""
    if world == 1:
        return [start(act, folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = node or world
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(node),
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank % node)} for rank in range(world)]
    return [start(act, folder, common | each, f"-{each['RANK']}") for each in ranks]


def train(recipe: Path, *overrides: object, stop_after: int | None = None) -> Callable[[], None]:
    """The launch script; with `stop_after`, the process is sent SIGTERM in the middle of that update."""
    launch = script(ROOT / "launch" / "train.py", recipe, *overrides)

    def act() -> None:
        if stop_after is not None:
            update = llm.training.trainer.Trainer.update

            def interrupted(self: llm.training.trainer.Trainer, step: int) -> tuple[torch.Tensor, torch.Tensor]:
                result = update(self, step)
                if step + 1 == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                return result

            llm.training.trainer.Trainer.update = interrupted  # type: ignore[method-assign]
        launch()

    return act


def digest(folder: Path, run: str = "tiny") -> str:
    """Of weights and moments of the newest checkpoint."""
    found = checkpoint.newest(folder / "runs" / run, print)
    assert found is not None
    return f"{found.step}:{found.digest}"
