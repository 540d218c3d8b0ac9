"""What the processes of a group agree on before the first step."""

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import llm.distributed.coordinator
import llm.interop.pretrained
import llm.training.trainer
from llm.distributed import environment
from llm.distributed.coordinator import Coordinator
from llm.training import teachers
from tests.forks import ROOT, Ended, digest, run_group, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def on(rank: int, there: Callable[[], None], elsewhere: Callable[[], None]) -> Callable[[], None]:
    return lambda: (there if os.environ.get("RANK", "0") == str(rank) else elsewhere)()


def odd_one_named(ended: list[Ended], *words: str) -> None:
    """The main process alone says which process differs, in one line; all leave with status 6."""
    assert [each.status for each in ended] == [6] * len(ended), ended
    assert len(ended[0].err.splitlines()) == 1 and all(word in ended[0].err for word in words), ended[0].err
    assert not any(each.err for each in ended[1:])


@pytest.mark.parametrize("odd", [0, 2])
def test_a_process_that_was_started_with_another_recipe_is_named(tmp_path: Path, text: Path, odd: int) -> None:
    recipe = write_recipe(tmp_path, text, **{"train.tokens_per_step": 96})
    ended = run_group(on(odd, train(recipe, "train.learning_rate=0.03"), train(recipe)), tmp_path, 3)
    who = "process 1" if odd == 0 else "process 2"  # the main process is the measure
    odd_one_named(ended, f"{who} has train.learning_rate = ", "0.03", "process 0 has")


def test_a_process_that_reads_another_text_is_named(tmp_path: Path, text: Path) -> None:
    """Two machines with disks and files of their own."""
    for name, documents in (("a", 60), ("b", 61)):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "text.txt", documents)
    recipe = write_recipe(tmp_path, Path("text.txt"))

    def act() -> None:
        os.chdir("a" if os.environ["RANK"] == "0" else "b")
        train(recipe)()

    odd_one_named(run_group(act, tmp_path, 2, node=1), "process 1 has the text's fingerprint = ")


@pytest.mark.parametrize("launcher_serves", [True, False])
def test_a_later_run_of_a_launch_reads_nothing_of_an_earlier_one(tmp_path: Path, launcher_serves: bool) -> None:
    """The store that torchrun serves outlives each run's group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = dist.TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False) if launcher_serves else None

    def act() -> None:
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(launcher_serves)}
        for number in range(6):
            environment._meet()
            coordinator = Coordinator()
            if os.environ["RANK"] == "0":
                time.sleep(0.1)
            assert coordinator.from_main("step", number) == number
            coordinator.agree("recipe", {"run": f"run{number}"}, "")
            if number % 2:  # a run that failed does not leave
                coordinator.leave()

    assert [(each.status, each.err) for each in run_group(act, tmp_path, 2)] == [(0, ""), (0, "")]
    del served


def test_a_process_that_alone_has_no_memory_for_a_teacher_ends_all(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_group(train(write_recipe(tmp_path, text)), tmp_path, 1)[0].status == 0
    real = teachers.within_memory
    monkeypatch.setattr(teachers, "within_memory", lambda act: None if os.environ.get("RANK") == "0" else real(act))
    recipe = write_recipe(tmp_path, text, **{"run": "pupil", "train.teachers": "[runs/tiny/best]"})
    odd_one_named(run_group(train(recipe), tmp_path, 2), "train.teachers: no memory for runs/tiny/best")


@pytest.mark.parametrize("place", ["runs", "runs/tiny"])
@pytest.mark.parametrize("dangling", [False, True])
def test_what_is_no_folder_in_the_run_s_place_is_named(tmp_path: Path, text: Path, place: str, dangling: bool) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to("/nowhere/at/all") if dangling else (tmp_path / place).write_text("a file")
    first, second = run_group(train(write_recipe(tmp_path, text)), tmp_path, 2)
    assert first.status == second.status == 2 and second.err == "" and first.err.count("\n") == 1, first.err
    assert "is no folder, and a folder is needed there" in first.err


def test_a_machine_that_cannot_write_the_run_folder_ends_all_with_its_error(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text)

    def refused() -> None:
        touch = Path.touch

        def touched(self: Path, *given: Any, **named: Any) -> None:
            if self.name.startswith(".here-") and "runs" in self.parts:
                raise OSError(errno.EROFS, "Read-only file system", str(self))
            touch(self, *given, **named)

        Path.touch = touched  # type: ignore[method-assign]
        train(recipe)()

    for rank in (0, 1):
        ended = run_group(on(rank, refused, train(recipe)), tmp_path, 2, node=1)
        assert [each.status for each in ended] == [5, 5], ended
        assert sum("Read-only file system" in each.err for each in ended) == 1, ended
        assert not list((tmp_path / "runs/tiny").glob(".here-*"))


def test_a_process_with_another_version_is_named(tmp_path: Path, text: Path) -> None:
    def older() -> None:
        torch.__version__ = "2.1"  # type: ignore[assignment]
        train(recipe)()

    recipe = write_recipe(tmp_path, text)
    odd_one_named(run_group(on(1, older, train(recipe)), tmp_path, 2), "process 1 has torch = 2.1, process 0 has")


@pytest.mark.parametrize("node", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_preparation_slower_than_the_time_out_does_not_end_the_group(tmp_path: Path, text: Path, node: int) -> None:
    """One machine of two processes, where the second waits; and two machines, where the main process waits and says so."""
    recipe = write_recipe(tmp_path, text)

    def act() -> None:
        llm.distributed.coordinator.HUNG = timedelta(seconds=2)
        prepare = llm.interop.pretrained.prepare
        late = os.environ["RANK"] == ("0" if node == 2 else "1")

        def slow(*arguments: Any, **keywords: Any) -> llm.interop.pretrained.Prepared:
            if late:
                time.sleep(5)
            return prepare(*arguments, **keywords)

        llm.interop.pretrained.prepare = slow
        train(recipe)()

    ended = run_group(act, tmp_path, 2, node)
    assert [each.status for each in ended] == [0, 0], ended
    assert digest(tmp_path).startswith("12:")
    assert ("waiting for the other machines" in ended[0].out) == (node == 1)


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_process_of_a_group_ends_whatever_its_threads_wait_for(world: str) -> None:
    """As one does that asks a main process that hangs; its output is whole, its status its own."""
    code = """
import sys, threading, time
from llm.base.errors import GroupError, run
def main():
    print("said")
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise GroupError("process 0 is gone")
run(main)
"""
    if world == "1":
        code = code.replace("args=(60,)", "args=(0,)")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "WORLD_SIZE": world, "RANK": "0"}, cwd=ROOT, timeout=20,
        capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (6, "said\n", "error: process 0 is gone\n")
