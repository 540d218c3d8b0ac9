"""A checkpoint is written while the training goes on: it holds the state of its step, and all that follows waits for it."""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llm.training.state_copy
from llm.base import atomic_io
from llm.base.errors import DiskError
from llm.distributed import process
from llm.distributed.coordinator import Coordinator
from llm.run_folder import checkpoint
from llm.run_folder.background import BackgroundWork
from llm.training.trainer import Trainer
from tests.forks import ended, run, run_group, start_group, train, write_recipe, write_text

EVERY = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def recipe_of(folder: Path, text: Path, **changes: object) -> Path:
    return write_recipe(folder, text, **{"checkpoint.every": EVERY, "evaluate.every": 99, **changes})


def digests(folder: Path) -> dict[int, str]:
    """Of every checkpoint, by its step; all of them are valid."""
    found = map(checkpoint.open_checkpoint, checkpoint.folders(folder / "runs/tiny"))
    return {each.step: each.digest for each in found}


def waiting(act: Callable[[], None]) -> Callable[[], None]:
    """`act` in a process that has no memory for a copy of the state."""

    def child() -> None:
        llm.training.state_copy.has_room = lambda size, processes: False
        act()

    return child


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[int, str]:
    """The checkpoints of a run that waited for each of them."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(waiting(train(recipe_of(folder, text))), folder)
    assert done.status == 0 and done.out.count("memory is short: the training waits") == 1, done.err
    return digests(folder)


def beside(
    act: Callable[[], None],
    disk: Callable[[str], None],
    update: Callable[[Trainer, int], None] = lambda trainer, step: None,
) -> Callable[[], None]:
    """`act` in a process that does `disk(NAME)` before each durable operation of a thread, and `update` after each update."""

    def child() -> None:
        real_update = Trainer.update

        def guarded(name: str, real: Callable[..., None]) -> Callable[..., None]:
            def operation(*arguments: Any) -> None:
                if threading.current_thread() is not threading.main_thread():
                    disk(name)
                real(*arguments)

            return operation

        def updated(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
            result = real_update(self, step)
            update(self, step + 1)
            return result

        for name in ("_write", "_write_at", "_flush", "_rename", "_remove"):
            setattr(atomic_io, name, guarded(name, getattr(atomic_io, name)))
        Trainer.update = updated  # type: ignore[method-assign]
        act()

    return child


def slow(name: str) -> None:
    time.sleep(0.01)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in atomic_io.read_lines(folder / "runs/tiny/metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("world", "shard"),
    [
        (1, "none"),
        pytest.param(2, "none", marks=pytest.mark.slow),
        (2, "full"),
        pytest.param(2, "hybrid", marks=pytest.mark.slow),
    ],
)
def test_on_a_slow_disk_each_checkpoint_holds_the_state_of_its_step(
    tmp_path: Path, text: Path, whole: dict[int, str], world: int, shard: str
) -> None:
    """The weights and moments that the next steps change in place are not what is written."""
    seen = tmp_path / "seen.txt"

    def update(trainer: Trainer, step: int) -> None:
        if process.rank() == 0 and trainer.checkpoints.writing.done is not None:
            with seen.open("a") as file:
                file.write(f"{step}\n")

    recipe = recipe_of(tmp_path, text, **{"machine.shard": shard})
    for each in run_group(beside(train(recipe), slow, update), tmp_path, world):
        assert each.status == 0, each.err
    assert len(seen.read_text().split()) >= 6, "steps were done meanwhile"
    assert digests(tmp_path) == whole and whole.keys() == {3, 6, 9, 12}


def test_machines_with_disks_of_their_own_gather_first(tmp_path: Path, text: Path, whole: dict[int, str]) -> None:
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    recipe = recipe_of(tmp_path, text, **{"machine.shard": "full"})

    def act() -> None:
        os.chdir(tmp_path / os.environ["RANK"])
        beside(train(recipe), slow)()

    for each in run_group(act, tmp_path, 2, node=1):
        assert each.status == 0, each.err
    assert digests(tmp_path / "0") == digests(tmp_path / "1") == whole


@pytest.mark.parametrize("shard", ["none", "full"])
def test_all_wait_where_one_is_short_of_memory(tmp_path: Path, text: Path, whole: dict[int, str], shard: str) -> None:
    recipe = recipe_of(tmp_path, text, **{"machine.shard": shard})

    def act() -> None:
        def never(name: str) -> None:
            raise AssertionError("written in a thread")

        short = process.rank() == (1 if shard == "full" else 0)
        (waiting if short else lambda act: act)(beside(train(recipe), never))()

    first, second = run_group(act, tmp_path, 2)
    assert first.status == second.status == 0, first.err
    assert first.out.count("memory is short") == 1 and digests(tmp_path) == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("world", "rank", "shard"), [(1, 0, "none"), pytest.param(2, 0, "none", marks=pytest.mark.slow), (2, 1, "full")]
)
def test_an_error_in_the_thread_ends_all_at_the_next_step(
    tmp_path: Path, text: Path, whole: dict[int, str], code: int, world: int, rank: int, shard: str
) -> None:
    saves: list[str] = []

    def disk(name: str) -> None:
        saves.append(name)
        if process.rank() == rank and saves.count("_write_at") == 3:  # the second checkpoint's first file
            raise OSError(code, os.strerror(code))

    def update(trainer: Trainer, step: int) -> None:
        if step == 2 * EVERY + 1 and (done := trainer.checkpoints.writing.done) is not None:
            done.wait()

    recipe = recipe_of(tmp_path, text, **{"machine.shard": shard})
    group = run_group(beside(train(recipe), disk, update), tmp_path, world)
    assert [each.status for each in group] == [5] * world, group[0].err
    told = "".join(each.err for each in group)
    assert told.count("\n") == 1 and "the disk failed at runs/tiny/checkpoints/.draft-step-000006/model" in told, told
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == 5
    assert digests(tmp_path).keys() == {3} and max(steps(tmp_path)) == 2 * EVERY
    assert not list((tmp_path / "runs").rglob(f"{atomic_io.DRAFT}*")), "its room is given back"
    assert all(each.status == 0 for each in run_group(train(recipe), tmp_path, world))
    assert digests(tmp_path) == whole


def test_an_error_in_the_last_of_them_is_not_overlooked(tmp_path: Path, text: Path) -> None:
    """SIGTERM arrives while the checkpoint of the very step is on its way."""

    def disk(name: str) -> None:
        time.sleep(0.02)
        if name == "_rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def update(trainer: Trainer, step: int) -> None:
        if step == EVERY:
            os.kill(os.getpid(), signal.SIGTERM)

    ended = run(beside(train(recipe_of(tmp_path, text)), disk, update), tmp_path)
    assert ended.status == 5 and digests(tmp_path) == {}, ended.err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [EVERY, EVERY + 1])
def test_asked_to_stop_it_waits_for_what_is_on_its_way(
    tmp_path: Path, text: Path, whole: dict[int, str], number: int, step: int
) -> None:
    def update(trainer: Trainer, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    recipe = recipe_of(tmp_path, text)
    stopped = run(beside(train(recipe), slow, update), tmp_path)
    assert stopped.status == 75 and max(digests(tmp_path)) == step and digests(tmp_path)[EVERY] == whole[EVERY]
    assert run(train(recipe), tmp_path).status == 0
    assert digests(tmp_path)[12] == whole[12]


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_error_in_the_training_does_not_take_the_checkpoint_along(
    tmp_path: Path, text: Path, whole: dict[int, str], interrupted: bool
) -> None:
    def update(trainer: Trainer, step: int) -> None:
        if step == EVERY + 1:
            raise KeyboardInterrupt if interrupted else ValueError("the moon is full")

    ended = run(beside(train(recipe_of(tmp_path, text)), slow, update), tmp_path)
    assert ended.status == (130 if interrupted else 1) and digests(tmp_path) == {EVERY: whole[EVERY]}


def test_a_run_that_diverges_names_the_checkpoint_that_was_on_its_way(
    tmp_path: Path, text: Path, whole: dict[int, str]
) -> None:
    def act() -> None:
        import llm.training.step

        apply = llm.training.step.GradientStep.apply

        def spoilt(self: llm.training.step.GradientStep, *given: Any) -> Any:
            if self.state.step == EVERY:
                for p in self.state.model.parameters():
                    if p.grad is not None:
                        p.grad.fill_(torch.nan)
            return apply(self, *given)

        llm.training.step.GradientStep.apply = spoilt  # type: ignore[method-assign]
        beside(train(recipe_of(tmp_path, text)), slow)()

    ended = run(act, tmp_path)
    assert ended.status == 3 and f"from=tiny/step-{EVERY:06d}" in ended.err, ended.err
    assert digests(tmp_path) == {EVERY: whole[EVERY]}


def test_the_record_and_the_plan_in_a_manifest_are_those_of_its_step(tmp_path: Path, text: Path) -> None:
    """Under train.hours the plan grows while a checkpoint that holds it is written."""
    recipe = recipe_of(tmp_path, text, **{"train.steps": None, "train.hours": 4 / 3600})

    def update(trainer: Trainer, step: int) -> None:
        time.sleep(0.02 + 0.001 * step)

    assert run(beside(train(recipe), slow, update), tmp_path).status == 0
    plans = {}
    for folder in checkpoint.folders(tmp_path / "runs/tiny"):
        plans[checkpoint.step_of(folder.name)] = checkpoint.read_manifest(folder)["budget"]["plan"]
    assert len(plans) > 1 and all(begin <= step for step, plan in plans.items() for begin, _ in plan)


def test_a_peer_that_dies_meanwhile_costs_one_interval_and_one_write(
    tmp_path: Path, text: Path, whole: dict[int, str]
) -> None:
    recipe = recipe_of(tmp_path, text, **{"machine.shard": "full"})

    def update(trainer: Trainer, step: int) -> None:
        if step == 2 * EVERY + 1 and process.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    children = start_group(beside(train(recipe), slow, update), tmp_path, 2)
    statuses = [ended(child, tmp_path, f"-{rank}").status for rank, child in enumerate(children)]
    assert statuses == [6, -signal.SIGKILL]
    assert EVERY in digests(tmp_path)
    assert all(each.status == 0 for each in run_group(train(recipe), tmp_path, 2))
    assert digests(tmp_path) == whole
    assert not list((tmp_path / "runs").rglob(f"{atomic_io.DRAFT}*"))


# ---------------------------------------------------------------------------------------------- the thread itself


class Held:
    """Work that goes on until it is hurried or released."""

    def __init__(self) -> None:
        self.go, self.hurried, self.abandoned = threading.Event(), False, False

    def part(self) -> None:
        assert self.go.wait(30)
        if self.hurried:
            raise InterruptedError("given up")

    def hurry(self) -> None:
        self.hurried = True
        self.go.set()

    def abandon(self) -> None:
        self.abandoned = True


def test_parts_follow_each_other_and_an_error_comes_out_once() -> None:
    work, held, done = BackgroundWork(Coordinator()), Held(), []
    work.begin([held.part, lambda: done.append(threading.current_thread())], abandon=held.abandon, hurry=held.hurry)
    work.poll()
    assert work.done is not None and not done
    held.go.set()
    work.wait()
    assert len(done) == 1 and done[0] is not threading.main_thread() and work.done is None and not held.abandoned

    def fails() -> None:
        raise OSError(errno.ENOSPC, "full")

    work.begin([fails, lambda: done.append(threading.current_thread())], abandon=held.abandon, hurry=held.hurry)
    with pytest.raises(DiskError, match="No space left"):
        work.wait()
    assert held.abandoned and len(done) == 1 and work.done is None
    work.poll()
    work.close()


def test_an_interrupted_wait_leaves_no_thread_behind() -> None:
    work, held = BackgroundWork(Coordinator()), Held()
    work.begin([held.part], abandon=held.abandon, hurry=held.hurry)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            work.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert held.hurried and held.abandoned and work.done is None
