"""Asked to stop, by whom and how it may be: the step is finished, all is saved, all processes agree, no one stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import llm.distributed.coordinator
from llm.training.stopping import StopRequest
from llm.training.trainer import Trainer
from tests.forks import ROOT, Ended, digest, ended, run, run_group, script, start, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """Digest of the run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(train(write_recipe(folder, text)), folder).status == 0
    return digest(folder)


def acting(recipe: Path, step: int, act: Callable[[Trainer], Any], rank: int = 0) -> Callable[[], None]:
    """The launch script, in which process `rank` does `act` in the middle of update `step`."""
    launch = script(ROOT / "launch" / "train.py", recipe)

    def child() -> None:
        update = Trainer.update

        def disturbed(self: Trainer, at: int) -> tuple[torch.Tensor, torch.Tensor]:
            result = update(self, at)
            if at + 1 == step and llm.distributed.process.rank() == rank:
                act(self)
            return result

        Trainer.update = disturbed  # type: ignore[method-assign]
        launch()

    return child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_each_signal_saves_and_the_same_command_goes_on(tmp_path: Path, text: Path, whole: str, name: str) -> None:
    recipe = write_recipe(tmp_path, text)
    stopped = run(acting(recipe, 5, lambda self: os.kill(os.getpid(), getattr(signal, name))), tmp_path)
    assert stopped.status == 75 and f"stopped ({name}) after step 5 of 12" in stopped.err
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == 75
    assert run(train(recipe), tmp_path).status == 0
    assert digest(tmp_path) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path: Path, text: Path, rank: int) -> None:
    recipe = write_recipe(tmp_path, text)
    both = run_group(acting(recipe, 5, lambda self: os.kill(os.getpid(), signal.SIGTERM), rank), tmp_path, 2)
    assert [each.status for each in both] == [75, 75]
    assert digest(tmp_path).startswith("5:") and "after step 5 of 12" in both[0].err


def test_a_second_ctrl_c_of_a_person_leaves_at_once_a_launchers_echo_does_not(tmp_path: Path, text: Path) -> None:
    def twice(pause: float) -> Callable[[Trainer], None]:
        def act(self: Trainer) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)

        return act

    recipe = write_recipe(tmp_path, text)
    assert run(acting(recipe, 5, twice(0.1)), tmp_path).status == 75
    left = run(acting(recipe, 7, twice(1.2)), tmp_path)
    assert left.status == 130 and "Traceback" not in left.err
    assert digest(tmp_path).startswith("5:")  # nothing was saved on that way out


def test_a_signal_that_comes_while_ranks_agree_is_agreed_on_next() -> None:
    class Waiting:
        """A group that waits in `largest`, in which the signal comes."""

        def largest(self, reason: int, *, after: str) -> int:
            if after == "step 1":
                os.kill(os.getpid(), signal.SIGTERM)
            return reason

    request = StopRequest(Waiting(), 0, -1)  # type: ignore[arg-type]
    with request.on_signals():
        assert [request.agreed(step) for step in range(3)] == [False, False, True]
    assert str(request) == "SIGTERM"


def test_the_first_ctrl_c_after_a_stop_by_others_still_lets_the_run_save() -> None:
    class Others:
        def largest(self, reason: int, *, after: str) -> int:
            return signal.SIGUSR1

    request = StopRequest(Others(), 0, -1)  # type: ignore[arg-type]
    request.began -= 60
    with request.on_signals():
        assert request.agreed(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked_at is not None
        request.asked_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert str(request) == "SIGUSR1"


def test_a_run_stops_by_itself_after_its_time(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"machine.stop_after": 0.3 / 3600})
    stopped = run(acting(recipe, 3, lambda self: time.sleep(0.5)), tmp_path)
    assert stopped.status == 75 and "machine.stop_after" in stopped.err


def test_the_launcher_that_is_stopped_leaves_no_orphan_and_a_saved_run(tmp_path: Path, text: Path) -> None:
    """`accelerate launch` of one process dies of SIGTERM without a word to its child, which asks to hear of it."""
    recipe = write_recipe(
        tmp_path, text, **{"train.steps": 100_000, "checkpoint.every": 100_000, "evaluate.every": 100_000}
    )
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "launch/train.py"), str(recipe)],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    metrics, status = tmp_path / "runs/tiny/metrics.jsonl", tmp_path / "runs/tiny/status.json"
    _until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    child = json.loads(status.read_text())["process"]
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(30)
    _until(lambda: json.loads(status.read_text())["status"] == 75)
    _until(lambda: not Path(f"/proc/{child}").exists())
    assert int(digest(tmp_path).partition(":")[0]) > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_the_main_process_that_dies_or_hangs_is_named_too(tmp_path: Path, text: Path, number: int) -> None:
    """It holds the board on which processes leave their notes, and the record: the other one speaks."""
    recipe = write_recipe(tmp_path, text)
    (tmp_path / "whole").mkdir()
    assert [each.status for each in run_group(train(recipe), tmp_path / "whole", 2)] == [0, 0]
    began = time.monotonic()
    second = _survivor(tmp_path, acting(recipe, 7, lambda self: os.kill(os.getpid(), number), rank=0), 1)
    assert second.status == 6, second.err
    # torch may have said something of its own before.
    assert second.err.splitlines()[-1].startswith("process 1: error: process 0 "), second.err
    assert "run the same command again" in second.err and "Traceback" not in second.err
    assert time.monotonic() - began < 30
    assert [each.status for each in run_group(train(recipe), tmp_path, 2)] == [0, 0]
    assert digest(tmp_path) == digest(tmp_path / "whole")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP])
@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_process_that_dies_or_hangs_is_named_and_the_same_command_goes_on(
    tmp_path: Path, text: Path, number: int, shard: str
) -> None:
    recipe = write_recipe(tmp_path, text, **{"machine.micro_batch": 1, "machine.shard": shard})
    (tmp_path / "whole").mkdir()
    assert [each.status for each in run_group(train(recipe), tmp_path / "whole", 2)] == [0, 0]
    began = time.monotonic()
    first = _survivor(tmp_path, acting(recipe, 7, lambda self: os.kill(os.getpid(), number), rank=1), 0)
    assert first.status == 6 and "process 1 (last heard of after step" in first.err, first.err
    assert time.monotonic() - began < 60
    assert [each.status for each in run_group(train(recipe), tmp_path, 2)] == [0, 0]
    assert digest(tmp_path) == digest(tmp_path / "whole")


def _survivor(folder: Path, act: Callable[[], None], rank: int) -> Ended:
    """How process `rank` of a group of two ends whose other one may never; the time-out is short."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def hasty() -> None:
        llm.distributed.coordinator.HUNG = timedelta(seconds=5)
        act()

    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = [start(hasty, folder, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}, f"-{r}") for r in range(2)]
    try:
        return ended(children[rank], folder, f"-{rank}", seconds=60)
    finally:
        os.kill(children[1 - rank], signal.SIGKILL)
        os.waitpid(children[1 - rank], 0)


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
