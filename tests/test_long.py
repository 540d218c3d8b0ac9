"""A long run stays flat: as much memory, as many open files and as much CPU time a step at its end as at its beginning."""

import itertools
import json
import os
import resource
import statistics
import time
from pathlib import Path

import pytest

import llm.training.stopping
from tests.forks import ended, start, train, write_recipe, write_text


def looks(folder: Path, steps: int, micro_batch: int) -> list[dict[str, float]]:
    """At each `every` steps of a run: bytes resident, files open, CPU seconds of the process."""
    changes = {
        "train.steps": steps,
        "tracking.every": 50,
        "evaluate.every": steps // 10,
        "checkpoint.every": steps // 20,
        "checkpoint.keep": 2,
        "evaluate.prompts": "[My self Har]",
        "machine.micro_batch": micro_batch,
    }
    recipe = write_recipe(folder, write_text(folder / "text.txt"), **changes)
    every = min(100, steps // 20)
    seen = folder / "looks.jsonl"

    def watched() -> None:
        asked_to_stop = llm.training.stopping.StopRequest.agreed

        def looked(self: llm.training.stopping.StopRequest, step: int) -> bool:
            if step % every == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                look = {
                    "step": step,
                    "resident": pages * resource.getpagesize(),
                    "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 (its own handle is counted each time)
                    "cpu": time.process_time(),
                }
                with seen.open("a") as file:
                    file.write(json.dumps(look) + "\n")
            return asked_to_stop(self, step)

        llm.training.stopping.StopRequest.agreed = looked  # type: ignore[method-assign]
        train(recipe)()

    child = ended(start(watched, folder), folder, seconds=3000)
    assert child.status == 0, child.err
    return [json.loads(line) for line in seen.read_text().splitlines()]


def flat(folder: Path, steps: int, micro_batch: int, cpu: bool) -> None:
    found = looks(folder, steps, micro_batch)
    warm = [look for look in found if steps * 0.15 <= look["step"] <= steps * 0.35]
    end = [look for look in found if look["step"] >= steps * 0.8]
    memory = [statistics.median(look["resident"] for look in part) for part in (warm, end)]
    # Blocks in which a checkpoint is written or an evaluation made cost more: the median is a block without.
    seconds = [
        statistics.median((b["cpu"] - a["cpu"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(part))
        for part in (warm, end)
    ]
    # A checkpoint that is still being written holds some more for a moment; a leak would raise the least.
    least = [min(look["files"] for look in part) for part in (warm, end)]
    print(
        f"{steps} steps: {memory[0] / 1e6:.1f} -> {memory[1] / 1e6:.1f} MB ({memory[1] / memory[0] - 1:+.2%}), "
        f"{least[0]} -> {least[1]} files, "
        f"{1e3 * seconds[0]:.3f} -> {1e3 * seconds[1]:.3f} ms of CPU a step ({seconds[1] / seconds[0] - 1:+.2%})"
    )
    assert least[1] <= least[0]
    assert memory[1] <= 1.05 * memory[0]
    if cpu:
        assert seconds[1] <= 1.05 * seconds[0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_500_steps_grow_neither_memory_nor_open_files(tmp_path: Path) -> None:
    flat(tmp_path, 500, 4, cpu=False)  # one micro-batch a step


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_20000_steps_are_flat_in_memory_open_files_and_cpu_time(tmp_path: Path) -> None:
    flat(tmp_path, 20_000, 2, cpu=True)
