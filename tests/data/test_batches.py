"""A step's windows follow from the step alone: the same on any world, in any micro-batch, and nothing is read twice."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.constants import IGNORED
from llm.data.batches import Batch, BatchLoader, Tokens, eval_batches
from llm.data.shuffle import WindowShuffle
from tests import tiny

CONTEXT, WINDOWS_PER_STEP = 4, 8
TEXT = Tokens(np.arange(100, dtype=np.uint16))  # each token says where it stands
WORLDS = [(world, micro_batch) for world in (1, 2, 4) for micro_batch in (1, 2, 4, 8) if world * micro_batch <= 8]


def step_of(step: int, world: int, micro_batch: int) -> list[list[Batch]]:
    """The micro-batches of `step` on each process."""
    side: Any = TEXT
    order = WindowShuffle(1, TEXT.tokens, CONTEXT)
    ranks = range(world)
    return [list(BatchLoader(side, order, WINDOWS_PER_STEP, micro_batch, rank, world).at(step)) for rank in ranks]


def windows_of(batches: list[Batch]) -> dict[int, tuple[list[int], list[int]]]:
    """Tokens and targets of each window, by its position."""
    return {
        position: (tokens, targets)
        for batch in batches
        for position, tokens, targets in zip(
            batch.windows.tolist(), batch.tokens.tolist(), batch.targets.tolist(), strict=True
        )
    }


@pytest.mark.parametrize(("world", "micro_batch"), WORLDS)
@pytest.mark.parametrize(
    "step", [0, 2, 7, 1000]
)  # 24 windows an epoch: step 2 ends one, step 7 and 1000 lie further on
def test_a_step_reads_the_same_windows_on_any_world(step: int, world: int, micro_batch: int) -> None:
    ranks = step_of(step, world, micro_batch)
    assert [len(batches) for batches in ranks] == [WINDOWS_PER_STEP // micro_batch // world] * world
    positions = torch.cat([batch.windows for batches in ranks for batch in batches]).tolist()
    assert sorted(positions) == list(range(step * WINDOWS_PER_STEP, (step + 1) * WINDOWS_PER_STEP))
    error_barrier = windows_of([batch for batches in ranks for batch in batches])
    assert error_barrier == windows_of(step_of(step, 1, WINDOWS_PER_STEP)[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_micro_batch_holds_the_same_windows_on_any_world(world: int) -> None:
    alone, ranks = step_of(3, 1, 2)[0], step_of(3, world, 2)
    for number, batch in enumerate(alone):
        dealt = ranks[number % world][number // world]
        assert torch.equal(dealt.windows, batch.windows)
        assert torch.equal(dealt.tokens, batch.tokens)


def test_targets_are_the_tokens_shifted_by_one() -> None:
    for batch in step_of(0, 1, 4)[0]:
        assert batch.tokens.shape == batch.targets.shape == (4, CONTEXT)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1)


def test_steps_go_on_where_the_last_one_ended_and_an_epoch_reads_each_window_once() -> None:
    order = WindowShuffle(1, TEXT.tokens, CONTEXT)
    assert order.windows == 3 * WINDOWS_PER_STEP
    for epoch in (0, 1):
        batches = [batch for step in range(3 * epoch, 3 * epoch + 3) for batch in step_of(step, 1, 2)[0]]
        read = torch.cat([batch.tokens for batch in batches])[:, 0].sort().values
        assert torch.equal(read, order.offset(epoch) + torch.arange(order.windows) * CONTEXT)


@settings(deadline=None)
@given(
    tokens=st.integers(0, 60),
    context=st.integers(1, 9),
    rows=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3, 4]),
)
def test_whole_covers_every_target_but_the_first_exactly_once(tokens: int, context: int, rows: int, world: int) -> None:
    side = Tokens(np.arange(1000, 1000 + tokens, dtype=np.uint16))
    ranks = [list(eval_batches(side, context, rows, rank, world)) for rank in range(world)]
    seen: Counter[int] = Counter()
    for batch in chain(*ranks):
        assert batch.tokens.shape == batch.targets.shape == (len(batch.windows), context)
        assert 1 <= len(batch.windows) <= rows
        counted = batch.targets != IGNORED
        assert torch.equal(batch.targets[counted], batch.tokens[counted] + 1)
        seen.update(batch.targets[counted].tolist())
    assert seen == Counter(range(1001, 1000 + tokens))
    rounds = -(-max(0, tokens - 1) // (world * rows * context))
    assert [len(batches) for batches in ranks] == [
        rounds
    ] * world  # a process with fewer would leave the others waiting


def test_under_the_mask_a_document_in_a_window_costs_what_it_costs_alone() -> None:
    """Of training windows and of held-out ones; without the mask it costs something else."""
    begin, model = 1, tiny.transformer()
    documents = [[begin, *range(2, 2 + length)] for length in (5, 9, 3, 14)]
    ids = np.array([*chain(*documents), begin], np.uint16)
    alone = sum(
        model(torch.tensor([each]), torch.tensor([[*each[1:], begin]])).item() for each in documents
    )  # the end of a document is the next one's beginning
    rows = len(ids) - 1  # all in one window
    wide = tiny.transformer(context=rows)
    wide.load_state_dict(model.state_dict())
    for told, same in ((begin, True), (None, False)):
        (batch,) = eval_batches(Tokens(ids), rows, 1, begin=told)
        assert (abs(wide(batch.tokens, batch.targets, None, batch.segments).item() - alone) < 1e-3) == same
        tokens, _, segments = WindowShuffle(1, len(ids), rows, told).rows(Tokens(ids), np.array([0]))
        assert (segments is None) != same and (tokens == batch.tokens.numpy()).all()
        assert segments is None or (segments == batch.segments.numpy()).all()
