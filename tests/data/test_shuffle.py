"""Every window of an epoch is read exactly once, in every epoch, in an order that follows from (seed, epoch) alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.shuffle import WindowShuffle

CONTEXT = 4
SIZES = [1, 2, 3, 5, 7, 97, 1009, *(2**bits + near for bits in (2, 3, 4, 5, 8, 10, 12) for near in (-1, 0, 1))]


def order_of(windows: int, seed: int = 1) -> WindowShuffle:
    """The order of a text with just so many windows and with room for every offset."""
    return WindowShuffle(seed, tokens=(windows + 1) * CONTEXT, context=CONTEXT)


def starts(order: WindowShuffle, epoch: int) -> np.ndarray:
    """Where the windows of `epoch` begin, in the order in which they are read."""
    return order.starts(np.arange(epoch * order.windows, (epoch + 1) * order.windows))


def windows_read(order: WindowShuffle, epoch: int) -> np.ndarray:
    """Numbers of the windows of `epoch`, in the order in which they are read."""
    return (starts(order, epoch) - order.offset(epoch)) // order.context


@pytest.mark.parametrize("windows", SIZES)
def test_every_window_is_read_exactly_once_in_every_epoch(windows: int) -> None:
    order = order_of(windows)
    assert order.windows == windows
    for epoch in (0, 1, 2, 1_000_000):
        assert np.array_equal(np.sort(windows_read(order, epoch)), np.arange(windows))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    context=st.integers(2, 64),
    more=st.integers(0, 20_000),
    epoch=st.integers(0, 10**9),
)
def test_windows_tile_the_text_and_never_leave_it(seed: int, context: int, more: int, epoch: int) -> None:
    order = WindowShuffle(
        seed, tokens=context + 1 + more, context=context
    )  # one window is the least that preparation lets by
    tiled = np.sort(starts(order, epoch))
    assert np.array_equal(tiled, tiled[0] + np.arange(order.windows) * context)
    assert tiled[0] >= 0
    assert tiled[-1] + context + 1 <= order.tokens
    assert order.tokens - order.windows * context <= 2 * context  # left out of this epoch


@pytest.mark.parametrize("tokens", range(CONTEXT + 1, 4 * CONTEXT))
def test_no_token_is_left_out_for_ever(tokens: int) -> None:
    order = WindowShuffle(1, tokens, CONTEXT)
    read = np.concatenate([starts(order, epoch) for epoch in range(100)])
    assert set((read[:, None] + np.arange(1, CONTEXT + 1)).flatten().tolist()) == set(range(1, tokens))


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(windows_read(order_of(64, seed), epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 20 * 20


def test_windows_begin_at_every_offset_over_the_epochs() -> None:
    order = WindowShuffle(1, tokens=100 * CONTEXT, context=CONTEXT)
    assert {order.offset(epoch) for epoch in range(100)} == set(range(CONTEXT))


@pytest.mark.parametrize("windows", [2, 3, 5, 7, 16, 33])
def test_no_window_has_a_favourite_place(windows: int) -> None:
    epochs = 100 * windows
    seen = np.zeros((windows, windows))
    for epoch in range(epochs):
        seen[np.arange(windows), windows_read(order_of(windows), epoch)] += 1
    expected = epochs / windows
    chi_square = ((seen - expected) ** 2 / expected).sum() * (windows - 1) / windows
    freedom = (windows - 1) ** 2
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom)  # six standard deviations


def test_neighbours_in_the_text_are_not_neighbours_in_the_order() -> None:
    windows = 1000
    follows = sum(int((np.diff(windows_read(order_of(windows), epoch)) == 1).sum()) for epoch in range(100))
    assert abs(follows - 100) < 60  # once an epoch by chance, with a standard deviation of 10 over a hundred epochs


def test_a_position_says_the_same_whatever_it_is_asked_with() -> None:
    order = order_of(5)
    positions = np.arange(23)  # across four ends of an epoch
    error_barrier = order.starts(positions)
    assert [order.starts(positions[i : i + 1]).item() for i in positions] == error_barrier.tolist()
    assert np.array_equal(order.starts(positions[::-1])[::-1], error_barrier)
    assert np.array_equal(order.starts(positions[:20].reshape(4, 5)), error_barrier[:20].reshape(4, 5))


def test_memory_does_not_grow_with_the_text() -> None:
    order = WindowShuffle(1, tokens=10**15, context=1024)
    tracemalloc.start()
    try:
        far = order.starts(np.arange(10**14, 10**14 + 1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(far.tolist())) == 1000
    assert peak < 1 << 20
