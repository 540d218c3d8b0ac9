"""What each process holds and sends where rows are dealt, measured on real processes."""

import ctypes
import os
from pathlib import Path
from typing import Literal

import pytest
import torch

from llm.config.reading import load
from llm.distributed.sharding import Sharding
from llm.model import cost
from llm.training.resume import Checkpoints
from llm.training.trainer import Trainer
from tests.forks import run_group, train, write_recipe, write_text

M_MMAP_THRESHOLD = -3  # glibc's
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def _status(name: str) -> int:
    """Bytes, of the field `name` of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peaks(folder: Path, recipe: Path, world: int, shard: Literal["none", "full"]) -> list[int]:
    """Each process's peak above what it held before the model was made: initialisation, training and saving."""
    launch = train(recipe, f"machine.shard={shard}")

    def act() -> None:
        make, before = Trainer.__init__, []

        def measured(self: Trainer, *arguments: object, **keywords: object) -> None:
            # What is freed goes back at once: counted is what is held, not what the C library keeps for later, nor the
            # holes between what it cut from its heap (by which one of four ranks or another held 60 MB more).
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
            # Before counting: what a first backward pass makes, and the engine's code (90 MB), imported at its first use.
            layer: torch.nn.Module = torch.nn.Linear(8, 8)
            if shard != "none":
                layer = Sharding(shard, torch.device("cpu")).shard_module(layer)
            layer(torch.ones(1, 8)).sum().backward()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before.append(_status("VmRSS"))
            make(self, *arguments, **keywords)

        save = Checkpoints.save

        def saved(self: Checkpoints, **keywords: bool) -> None:
            save(self, **keywords)
            Path(f"peak-{os.environ.get('RANK', '0')}").write_text(str(_status("VmHWM") - before[-1]))

        Trainer.__init__, Checkpoints.save = measured, saved
        launch()

    folder.mkdir()
    for each in run_group(act, folder, world, seconds=900):
        assert each.status == 0, each.err
    return [int((folder / f"peak-{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_100_million_numbers_dealt_to_four_take_a_third_of_what_one_holds(
    tmp_path: Path, text: Path, optimizer: str
) -> None:
    recipe = write_recipe(tmp_path, text, **{
        "train.optimizer": optimizer, "model.dim": 720, "model.heads": 12, "model.layers": 16, "model.dropout": 0,
        "train.steps": 2, "train.warmup": 0, "train.decay": 0, "train.tokens_per_step": 128, "machine.micro_batch": 1,
        "evaluate.every": 99, "checkpoint.every": 2})  # fmt: skip
    (one,) = peaks(tmp_path / "one", recipe, 1, "none")
    four = peaks(tmp_path / "four", recipe, 4, "full")
    print(f"{optimizer}: one {one / 1e6:.0f} MB, four {[round(each / 1e6) for each in four]} MB, {max(four) / one:.3f}")
    assert max(four) <= 0.35 * one


def sent(folder: Path, text: Path, steps: int, shard: str, micro_batch: int) -> int:
    """Bytes over the loopback interface in a run of two processes of so many steps."""
    recipe = write_recipe(folder, text, **{
        "run": f"{shard}-{micro_batch}-{steps}", "train.optimizer": "adamw", "model.dim": 256, "model.heads": 4, "model.layers": 4,
        "train.steps": steps, "train.warmup": 0, "train.decay": 0, "train.tokens_per_step": 128, "machine.shard": shard,
        "machine.micro_batch": micro_batch, "evaluate.every": 999, "checkpoint.every": 999, "model.dropout": 0})  # fmt: skip
    counter = Path("/sys/class/net/lo/statistics/tx_bytes")
    before = int(counter.read_text())
    for each in run_group(train(recipe), folder, 2):
        assert each.status == 0, each.err
    return int(counter.read_text()) - before


def a_step(folder: Path, text: Path, shard: str, micro_batch: int) -> float:
    """Bytes that each of two processes sends a step: what ten more steps sent."""
    return (sent(folder, text, 15, shard, micro_batch) - sent(folder, text, 5, shard, micro_batch)) / 10 / 2


def test_whole_gradients_go_once_a_step_however_many_micro_batches(tmp_path: Path, text: Path) -> None:
    once, four_times = a_step(tmp_path, text, "none", 4), a_step(tmp_path, text, "none", 1)
    print(f"none: {once / 1e6:.2f} MB a step, accumulated four times {four_times / 1e6:.2f} MB")
    assert four_times <= 1.1 * once


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_dealt_rows_send_what_the_formula_says(tmp_path: Path, text: Path, micro_batch: int) -> None:
    measured = a_step(tmp_path, text, "full", micro_batch)
    recipe = load(tmp_path / "recipe.yaml")
    said = cost.traffic(
        recipe.model, recipe.tokenizer.vocabulary, muon=False, shard_size=2, micro_batches=4 // micro_batch
    ).total
    print(
        f"full, {4 // micro_batch} micro-batches: {measured / 1e6:.2f} MB a step, the formula says {said / 1e6:.2f} MB"
    )
    assert said / 1.1 <= measured <= 1.1 * said
