"""machine.exact: the same weights and moments, to the bit, on any number of processes and however they lie."""

from pathlib import Path

import pytest
import torch

from llm.distributed.pairwise_sum import PairwiseSum
from llm.distributed.sharding import tree_sum
from tests.forks import digest, run_group, train, write_recipe, write_text
from tests.test_worlds import go

WORLDS = [(1, "none"), (2, "none"), (2, "full"), (4, "none"), (4, "full"), (4, "hybrid")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def exact_recipe(folder: Path, text: Path, optimizer: str) -> Path:
    """Eight micro-batches a step, dropout on, the softmax sampled at first, and shapes that nothing divides."""
    return write_recipe(folder, text, **{
        "train.optimizer": optimizer, "train.tokens_per_step": 256, "train.sampled_softmax": 60, "machine.exact": "true",
        "machine.micro_batch": "auto", "model.dim": 46, "model.heads": 3, "model.head_dim": 14, "model.ffn_dim": 75})  # fmt: skip


def test_the_counter_sums_a_balanced_tree() -> None:
    parts = [torch.randn(1000) * 10**exponent for exponent in range(-4, 4)]
    counter = PairwiseSum()
    for part in parts:
        counter.add([part])
    assert torch.equal(counter.total()[0], tree_sum(parts))


def one_digest(folder: Path, text: Path, optimizer: str, worlds: list[tuple[int, str]]) -> None:
    recipe = exact_recipe(folder, text, optimizer)
    for world, shard in worlds:
        go(folder / f"{world}-{shard}", recipe, world, shard)
    assert len({digest(folder / f"{world}-{shard}") for world, shard in worlds}) == 1


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_bits_are_the_same_on_1_and_2_processes(tmp_path: Path, text: Path, optimizer: str) -> None:
    one_digest(tmp_path, text, optimizer, WORLDS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_bits_are_the_same_on_1_2_and_4_processes(tmp_path: Path, text: Path, optimizer: str) -> None:
    one_digest(tmp_path, text, optimizer, WORLDS)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_saved_on_any_world_and_resumed_on_any_other_the_bits_are_the_same(
    tmp_path: Path, text: Path, optimizer: str
) -> None:
    recipe = exact_recipe(tmp_path, text, optimizer)
    go(tmp_path / "whole", recipe, 1, "none")
    for stop, (world, shard) in zip((2, 4, 6, 8), [(2, "full"), (4, "none"), (1, "none"), (4, "hybrid")], strict=True):
        go(tmp_path / "parts", recipe, world, shard, status=75, stop_after=stop)
    go(tmp_path / "parts", recipe, 2, "none")
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_what_is_no_balanced_tree_is_refused(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"train.tokens_per_step": 192, "machine.exact": "true"})
    (ended,) = run_group(train(recipe, "machine.micro_batch=2"), tmp_path, 1)
    assert ended.status == 2 and "powers of two" in ended.err and len(ended.err.splitlines()) == 1
