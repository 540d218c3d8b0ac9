"""The formulas of llm/model/cost.py against what a model and its optimizer hold, and against what an interface counts."""

import ctypes
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llm.training.trainer
from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.config.schema import Recipe
from llm.distributed.sharding import LocalShard, bounds, local_shard
from llm.insight.planning import sized
from llm.model import cost
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer
from tests.forks import ROOT, run, run_group, train, write_recipe, write_text

RECIPES = ["quickstart", "classic", "small", "medium", "large", "tiny"]
WORLDS = [1, 2, 4, 7]  # 7: rows that do not come out even, and processes that hold none


def recipe(folder: Path, name: str) -> Recipe:
    path = write_recipe(folder, folder / "none.txt") if name == "tiny" else ROOT / "recipes" / f"{name}.yaml"
    return sized(with_steps(load(path), 1_400_000))  # tokens of a text, by which `auto` is settled


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_bytes_are_those_that_model_and_optimizer_hold(tmp_path: Path, name: str) -> None:
    """On the meta device, where a 344 M model takes no room; each process's rows by the rule by which they are dealt."""
    read = recipe(tmp_path, name)
    muon, vocabulary = read.train.optimizer == "muon", read.tokenizer.vocabulary
    for tied in (True, False):
        shape = replace(read.model, tied=tied)
        with torch.device("meta"):
            model = Transformer.__new__(Transformer)
            model.initialise = lambda seed: None  # type: ignore[method-assign]  # no generator on this device
            model.__init__(shape, vocabulary)  # type: ignore[misc]
            moments = Optimizer(model, read.train).moments
        weights = [local_shard(p) for p in model.parameters()]
        assert cost.parameters(shape, vocabulary) == sum(rows.local.numel() for rows in weights)
        for world in WORLDS:
            for index in range(world):
                found = cost.memory(shape, vocabulary, muon=muon, shard_size=world, index=index)
                assert found.weights == found.gradients == sum(part(rows, world, index) for rows in weights)
                assert found.moments == sum(part(rows, world, index) for rows in moments.values())


def part(rows: LocalShard, world: int, index: int) -> int:
    """Bytes of the rows that process `index` holds."""
    low, high = bounds(rows.shape[0], world, index)
    return rows.local[low:high].numel() * rows.local.element_size()


def test_bytes_for_people() -> None:
    assert [cost.size(n) for n in (0, 999, 999.7, 4.591e9, 2.5e13)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "4.59 GB",
        "25 TB",
    ]


def counted_steps(folder: Path, changes: dict[str, object], steps: int = 2) -> tuple[float, cost.Traffic]:
    """Bytes a process sends a step, as its loopback interface counts them in a namespace of its own; and the formula's."""
    folder.mkdir()
    recipe = write_recipe(
        folder,
        write_text(folder / "text.txt"),
        **changes,
        **{"evaluate.every": 99, "checkpoint.every": 99, "tracking.every": 99},
    )

    def act() -> None:
        update, said = llm.training.trainer.Trainer.update, folder / f"counted-{os.environ['RANK']}.json"
        counted: list[int] = []

        def counting(self: llm.training.trainer.Trainer, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.context.coordinator.largest(0)
            counted.append(sent())
            self.context.coordinator.largest(0)  # nobody goes on while another counts
            if len(counted) == steps + 1:
                traffic = self.costs()[1]
                said.write_text(
                    json.dumps([(counted[-1] - counted[0]) / steps / WORLD, traffic.shards, traffic.replicas])
                )
            return update(self, step)

        llm.training.trainer.Trainer.update = counting  # type: ignore[method-assign]
        train(recipe, f"train.steps={steps + 1}", "train.warmup=0")()

    def alone() -> None:
        if (
            ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET)
            or subprocess.run(["ip", "link", "set", "lo", "up"]).returncode
        ):
            raise SystemExit(NOT_ALLOWED)
        node = NODE if changes["machine.shard"] == "hybrid" else 0
        for each in run_group(act, folder, WORLD, node):
            assert each.status == 0, each.err

    ended = run(alone, folder)
    if ended.status == NOT_ALLOWED:
        pytest.skip("bytes are counted in a network namespace, which may not be made here")
    assert ended.status == 0, ended.err
    found, shards, replicas = json.loads((folder / "counted-0.json").read_text())
    return found, cost.Traffic(shards, replicas)


def sent() -> int:
    (line,) = [each for each in Path("/proc/net/dev").read_text().splitlines() if each.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


CLONE_NEWNET, NOT_ALLOWED, WORLD, NODE = 0x40000000, 77, 4, 2
LARGE_ENOUGH = {
    "model.dim": 256,
    "model.layers": 4,
    "model.heads": 4,
    "train.tokens_per_step": 256,
    "machine.micro_batch": 1,
}
# 256 tokens a step are 16 windows, 4 a process: 4 micro-batches of 1, or 1 of 4


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("shard", ["none", "full", "hybrid"])
@pytest.mark.slow
def test_the_interface_counts_the_bytes_of_the_formula(tmp_path: Path, shard: str, optimizer: str) -> None:
    changes = LARGE_ENOUGH | {"machine.shard": shard, "train.optimizer": optimizer}
    found, formula = counted_steps(tmp_path / "run", changes)
    assert formula.total * 0.95 < found < formula.total * 1.1


@pytest.mark.slow
def test_whole_gradients_are_sent_once_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    changes: dict[str, object] = {**LARGE_ENOUGH, "machine.shard": "none"}
    four, _ = counted_steps(tmp_path / "four", changes)
    one, _ = counted_steps(tmp_path / "one", changes | {"machine.micro_batch": 4})
    assert four < 1.1 * one
