"""train.sampled_softmax: which pieces the training loss covers is a function of seed and step alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.training.sampling import SURE, SampledSoftmax, chances_of

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


@given(st.integers(1, 49), st.integers(0, 1 << 40))
def test_pieces_are_drawn_once_and_follow_from_seed_and_step(pieces: int, step: int) -> None:
    chosen, again = softmax(pieces).at(step), softmax(pieces).at(step)
    assert chosen is not None and again is not None
    assert len(chosen.pieces) == len(set(chosen.pieces.tolist())) == len(chosen.log_weights) == pieces
    assert chosen.log_weights.min() >= 0 and chosen.pieces.max() < 50
    assert torch.equal(chosen.pieces, again.pieces)


@given(st.lists(st.integers(0, 1 << 22), min_size=2, max_size=300), st.data())
def test_chances_rise_with_the_frequency_up_to_certainty(counts: list[int], data: st.DataObject) -> None:
    drawn = data.draw(st.integers(1, len(counts) - 1))
    chances = chances_of(np.sort(counts)[::-1], drawn)
    assert chances.sum() == drawn * SURE and chances.min() > 0 and chances.max() <= SURE
    assert (np.diff(chances) <= 1).all()  # but for what rounding left over


def test_weights_make_up_for_what_is_not_drawn() -> None:
    """The sum of the weights of the pieces drawn, each step's, is on average the number of pieces, for each of them."""
    sampler, seen = softmax(10), torch.zeros(50)
    for step in range(4000):
        chosen = sampler.at(step)
        assert chosen is not None
        seen[chosen.pieces] += chosen.log_weights.exp() / 4000
    assert seen.min() > 0.5 and (seen - 1).abs().mean() < 0.06
    assert seen[40:].sub(1).abs().max() < 0.1


@pytest.mark.parametrize("pieces", [0, 50, 1 << 30])
def test_all_pieces_are_covered_where_none_are_left_out(pieces: int) -> None:
    assert softmax(pieces).at(3) is None
