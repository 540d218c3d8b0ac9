"""The learning rate is a function of the step: up, level, down."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.optim.schedule import lr_factor


def shares(steps: int, *, warmup: int = 0, decay: float = 0.0) -> list[float]:
    return [lr_factor(step, plan=[(0, steps)], warmup=warmup, decay=decay) for step in range(steps)]


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    assert shares(5) == [1.0] * 5


def test_the_rate_rises_holds_and_falls_by_equal_parts() -> None:
    assert shares(10, warmup=4, decay=0.3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_decay_over_the_whole_run_falls_from_the_first_update() -> None:
    assert shares(4, decay=1.0) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_update_after_the_last_would_not_move() -> None:
    assert lr_factor(10, plan=[(0, 10)], warmup=0, decay=0.3) == 0.0


def test_a_longer_run_is_the_same_until_the_shorter_one_begins_to_fall() -> None:
    short, long = shares(100, warmup=10, decay=0.4), shares(300, warmup=10, decay=0.4)
    assert short[:60] == long[:60]
    assert short[60] < long[60]


@settings(deadline=None)
@given(steps=st.integers(1, 300), rising=st.floats(0, 1), decay=st.floats(0, 1))
def test_every_update_moves_and_none_by_more_than_the_full_rate(steps: int, rising: float, decay: float) -> None:
    curve = shares(steps, warmup=int(rising * (1 - decay) * steps), decay=decay)
    assert all(0 < share <= 1 for share in curve)
    top = curve.index(max(curve))
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert curve[top:] == sorted(curve[top:], reverse=True)
