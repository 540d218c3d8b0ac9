"""Memory that runs short halves the micro-batch and does the step anew, on the same curve."""

import ctypes
import gc
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llm.training.session
from llm.training.micro_batch import MicroBatches
from llm.training.trainer import Trainer
from tests.forks import run, run_group, train, write_recipe, write_text
from tests.test_memory import M_MMAP_THRESHOLD

BLOCK = 1 << 20  # bytes, from which on memory is the system's and goes back at once


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=200)


def take_holes() -> None:
    """Take what the heap holds free in one piece of BLOCK or more, as it counts as held and would be had past a limit."""
    c = ctypes.CDLL(None)
    c.malloc.argtypes, c.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    while not ctypes.c_size_t.from_address((block := c.malloc(BLOCK)) - ctypes.sizeof(ctypes.c_size_t)).value & 2:
        pass  # 2 marks what did not come from the heap, but from the system
    c.free(ctypes.c_void_p(block))


def limited(recipe: Path, headroom: int, at: int, *overrides: str) -> Callable[[], None]:
    """Training whose process may hold `headroom` bytes more than it does just before update `at`.

    Before the rehearsal where `at` is negative, and then not the main process.
    """

    def limit() -> None:
        gc.collect()  # else what earlier tests left in this process may be freed past the limit, and make room
        take_holes()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + headroom, resource.RLIM_INFINITY))

    def act() -> None:
        # What is freed goes back at once: else the C library may keep enough of a pass for the next one.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK)
        update, rehearse = Trainer.update, MicroBatches.rehearse

        def short(self: Trainer, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if step == at:
                limit()
            return update(self, step)

        def short_before(self: MicroBatches) -> float:
            if at < 0 and os.environ.get("RANK", "0") != "0":
                limit()
            return rehearse(self)

        Trainer.update, MicroBatches.rehearse = short, short_before  # type: ignore[method-assign]
        train(recipe, *overrides)()

    return act


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "runs/tiny/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def large(folder: Path, text: Path, **changes: object) -> Path:
    """Micro-batches whose activations are hundreds of megabytes."""
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, text, **{
        "model.context": 256, "train.tokens_per_step": 16 * 256, "machine.micro_batch": "auto", "model.dim": 16, "model.ffn_dim": 4096,
        "train.steps": 3, "evaluate.every": 99, "checkpoint.every": 99, "train.warmup": 0, "model.layers": 1, **changes})  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_the_step_is_done_anew_in_smaller_micro_batches_on_the_same_curve(tmp_path: Path, text: Path) -> None:
    recipe = large(tmp_path / "whole", text)
    assert run(train(recipe), tmp_path / "whole").status == 0
    (tmp_path / "short").mkdir()
    done = run(limited(recipe, 60 << 20, at=1), tmp_path / "short")
    assert done.status == 0, done.err
    assert "no memory for micro-batches of 8 windows at step 2" in done.out
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "short")
    assert found[:1] == expected[:1] and len(found) == len(expected)
    assert found == pytest.approx(expected, rel=1e-4)
    kept = json.loads((tmp_path / "short/runs/tiny/machine.json").read_text())
    assert kept["micro_batch"] < 8


def test_a_new_run_that_is_short_before_its_first_step_begins_in_smaller_ones(tmp_path: Path, text: Path) -> None:
    recipe = large(tmp_path, text)

    def act() -> None:
        passed, failed = MicroBatches._forward_backward, []

        def short(self: MicroBatches, size: int) -> float:
            if size == 8 and not failed:
                failed.append(size)
                raise MemoryError
            return passed(self, size)

        MicroBatches._forward_backward = short  # type: ignore[method-assign]
        train(recipe)()

    done = run(act, tmp_path)
    assert done.status == 0 and "no memory for micro-batches of 8 windows at step 1: repeating it" in done.out, done


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_ends_while_the_model_is_built_is_one_line(tmp_path: Path, text: Path, world: int) -> None:
    def short(*given: object, **named: object) -> None:
        raise MemoryError("no room")

    def act() -> None:
        llm.training.session.Trainer = short  # type: ignore[assignment, misc]
        train(write_recipe(tmp_path, text))()

    for done in run_group(act, tmp_path, world):
        assert done.status == 6 and done.err.count("\n") == 1 and "no memory to begin: take a smaller" in done.err, (
            done.err
        )


def test_a_run_that_was_removed_is_not_made_anew_by_a_smaller_micro_batch(tmp_path: Path, text: Path) -> None:
    def act() -> None:
        def accumulate(self: MicroBatches, step: int, *of_step: object) -> None:
            shutil.rmtree(self.context.folder)
            self.halve(step + 1)

        MicroBatches.accumulate = accumulate  # type: ignore[method-assign,assignment]
        train(large(tmp_path, text))()

    ended = run(act, tmp_path)
    assert ended.status == 5 and "was removed while it trained" in ended.err, ended.err
    assert not (tmp_path / "runs/tiny").exists()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("world", "changes", "mend"),
    [
        pytest.param(
            1, {"machine.exact": "true", "machine.micro_batch": 8}, "machine.micro_batch=4", marks=pytest.mark.slow
        ),
        (1, {"machine.micro_batch": 8}, "machine.micro_batch=4"),
        (2, {"machine.micro_batch": 8}, "machine.micro_batch=4"),
        (
            1,
            {"machine.micro_batch": 1, "train.tokens_per_step": 1 << 12, "model.context": 1 << 12},
            "machine.recompute=true",
        ),
    ],
)
def test_where_that_cannot_be_the_setting_that_may_do_is_named(
    tmp_path: Path, text: Path, world: int, changes: dict[str, object], mend: str
) -> None:
    recipe = large(tmp_path, text, **changes)
    ended = run_group(limited(recipe, 60 << 20, at=1), tmp_path, world)
    assert {each.status for each in ended} == {6}, ended[0].err
    said = "".join(each.err for each in ended)
    assert mend in said and "at step 2" in said and "Traceback" not in said, said


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_one_of_a_group_that_is_short_before_the_first_step_takes_the_others_along(tmp_path: Path, text: Path) -> None:
    recipe = large(tmp_path, text, **{"machine.micro_batch": 8})
    main, other = run_group(limited(recipe, 60 << 20, at=-1), tmp_path, 2)
    assert other.status == 6 and "machine.micro_batch=4" in other.err and "Traceback" not in other.err, other.err
    assert main.status == 6 and "process 1" in main.err and "Traceback" not in main.err, main.err
