"""Gradients are summed beside the backward pass, in buckets of any size, and neither touches a bit."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm.distributed import exchange, process
from llm.distributed.exchange import Exchange
from llm.training.trainer import Trainer
from tests.forks import digest, run_group, train, write_recipe, write_text

SMALL = 0.01  # MB: each matrix of the tiny model is a bucket
Act = Callable[[], None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def divided(act: Act, megabytes: float, sum_chunk: Callable[[Tensor], Tensor]) -> Act:
    """`act` in a process with buckets of that size, each summed by `sum_chunk`."""

    def child() -> None:
        exchange.BUCKET_MB["cpu"] = megabytes  # type: ignore[assignment]
        exchange.sum_chunk = sum_chunk
        act()

    return child


def slowly(flat: Tensor) -> Tensor:
    """Sum after a while, another one on each process."""
    with Path(f"buckets-{process.rank()}.txt").open("a") as file:
        file.write(f"{dist.get_world_size()} {flat.numel()}\n")
    time.sleep(random.Random(time.monotonic_ns()).choice([0, 0, 0.003]))
    return sum_(flat)


sum_ = exchange.sum_chunk


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        pytest.param({"machine.micro_batch": 1, "model.tied": "false"}, False, marks=pytest.mark.slow),
        ({"machine.micro_batch": "auto", "machine.exact": "true"}, True),
    ],
)
def test_many_buckets_that_are_slow_are_one_bucket_to_the_bit(
    tmp_path: Path, text: Path, world: int, changes: dict[str, object], alone: bool
) -> None:
    """Both with several micro-batches a step; where the bits are those of any world, also one process's."""
    recipe = train(write_recipe(tmp_path, text, **{"train.tokens_per_step": 128, **changes}))
    acts = {"one": divided(recipe, 25, sum_), "many": divided(recipe, SMALL, slowly)}
    for name, act in (acts | {"alone": recipe}).items():
        (tmp_path / name).mkdir()
        for each in run_group(act, tmp_path / name, 1 if name == "alone" else world):
            assert each.status == 0, each.err
    assert digest(tmp_path / "many") == digest(tmp_path / "one")
    assert not alone or digest(tmp_path / "alone") == digest(tmp_path / "one")
    orders = [(tmp_path / f"many/buckets-{rank}.txt").read_text().split("\n") for rank in range(world)]
    assert all(order == orders[0] for order in orders) and orders[0][0].startswith(f"{world} ")
    assert len(set(orders[0])) > 4


def test_no_sum_holds_up_the_backward_pass(tmp_path: Path, text: Path) -> None:
    """Each sum waits here for the end of the pass: the pass would never end if it waited for a sum."""
    passed, hook, finish = Event(), Exchange.hook, Exchange.finish

    def hooked(self: Exchange, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        ready = hook(self, state, bucket)
        if bucket.is_last():
            passed.set()
        return ready

    def finished(self: Exchange) -> None:
        finish(self)
        passed.clear()

    def late(flat: Tensor) -> Tensor:
        assert passed.wait(60), "the backward pass waits for a sum"
        return sum_(flat)

    def act() -> None:
        Exchange.hook, Exchange.finish = hooked, finished  # type: ignore[method-assign]
        divided(train(write_recipe(tmp_path, text)), SMALL, late)()

    for each in run_group(act, tmp_path, 2):
        assert each.status == 0, each.err


@pytest.mark.parametrize("where", ["in a sum", "in the pass"])
def test_memory_that_ends_after_some_buckets_were_sent_ends_the_group_and_touches_nothing(
    tmp_path: Path, text: Path, where: str
) -> None:
    recipe, at, update = write_recipe(tmp_path, text, **{"checkpoint.every": 1}), 3, Trainer.update
    sums: list[int] = []

    def short(*_: object) -> None:
        raise MemoryError

    def updated(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
        sums.clear()
        if step == at and process.rank() == 1:
            if where == "in the pass":
                next(self.state.model.parameters()).register_hook(short)  # the last one to have its gradient
            else:
                sums.extend(range(3))
        return update(self, step)

    def sum_chunk(flat: Tensor) -> Tensor:
        if sums and sums.pop() == 0:
            short()
        return sum_(flat)

    def act() -> None:
        Trainer.update = updated  # type: ignore[method-assign]
        divided(train(recipe), SMALL, sum_chunk)()

    main, other = run_group(act, tmp_path, 2)
    assert other.status == main.status == 6, other.err
    assert f"at step {at + 1}" in other.err and "machine.micro_batch=1" in other.err and "Traceback" not in other.err
    assert "process 1" in main.err and "is gone" in main.err and "Traceback" not in main.err, main.err
    assert digest(tmp_path).startswith(f"{at}:")
    for each in run_group(train(recipe), tmp_path, 2):
        assert each.status == 0, each.err
    whole = tmp_path / "whole"
    whole.mkdir()
    run_group(train(recipe), whole, 2)
    assert digest(whole) == digest(tmp_path)


def test_the_thread_of_the_sums_computes_alone_and_leaves_the_main_thread_its_team(tmp_path: Path) -> None:
    def act() -> None:
        torch.set_num_threads(3)
        found = Exchange().summing.submit(torch.get_num_threads).result()
        assert (found, torch.get_num_threads()) == (1, 3)

    (ended,) = run_group(act, tmp_path, 1)
    assert ended.status == 0, ended.err
