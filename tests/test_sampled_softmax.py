"""train.sampled_softmax: which pieces the training loss covers is a function of seed and step alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.training.sampling import LEAST_RATE, SampledSoftmax

IDS = np.repeat(np.arange(50), np.arange(50)).astype(np.uint16)  # piece n occurs n times


def softmax(pieces: int, seed: int = 1) -> SampledSoftmax:
    side = SimpleNamespace(tokens=len(IDS), read=lambda start, stop: IDS[start:stop])
    recipe = SimpleNamespace(seed=seed, train=SimpleNamespace(sampled_softmax=pieces))
    context = SimpleNamespace(
        device=torch.device("cpu"),
        recipe=recipe,
        tokenizer=SimpleNamespace(vocab_size=50),
        shards=SimpleNamespace(train=side),
    )
    return SampledSoftmax(context)  # type: ignore[arg-type]


@given(st.integers(2, 49), st.integers(0, 1 << 40))
def test_the_frequent_half_is_always_there_and_the_others_stand_for_all_the_rest(pieces: int, step: int) -> None:
    chosen = softmax(pieces).at(step, 1.0)
    assert chosen is not None
    assert len(chosen.pieces) == len(set(chosen.pieces.tolist())) == pieces
    assert set(range(50 - pieces // 2, 50)) <= set(chosen.pieces.tolist())
    assert chosen.log_weights.exp().sum().item() == pytest.approx(50)
    again = softmax(pieces).at(step, 1.0)
    assert again is not None and torch.equal(chosen.pieces, again.pieces)


def test_every_piece_has_its_turn() -> None:
    sampler = softmax(10)
    chosen = [sampler.at(step, 1.0) for step in range(100)]
    assert {piece for each in chosen if each is not None for piece in each.pieces.tolist()} == set(range(50))


@pytest.mark.parametrize(("pieces", "rate"), [(0, 1.0), (50, 1.0), (1 << 30, 1.0), (10, LEAST_RATE - 1e-6)])
def test_all_pieces_are_covered_where_none_are_left_out_or_the_rate_is_low(pieces: int, rate: float) -> None:
    assert softmax(pieces).at(3, rate) is None
