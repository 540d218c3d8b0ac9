"""Guessed tokens change no text and no bit; rounded weights cost what `evaluate --int8` says."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.errors import RecipeError
from llm.inference.fast_decode import PREPARED, FastDecoder, prepare_weights
from llm.inference.generation import generate
from llm.inference.lookup import MOST, PATIENCE, Lookup
from llm.inference.products import Int8Product, Product, input_bits
from llm.inference.sampling import Sampling
from llm.inference.slots import Slots
from llm.model.transformer import Transformer
from tests import tiny

GREEDY, CONTEXT = Sampling(temperature=0, repetition_penalty=1), 160
SAMPLED = Sampling(temperature=0.7, top_k=20, repetition_penalty=1.3)


class Oracle(Lookup):
    """Guesses from a list, right or wrong."""

    known: ClassVar[list[int]] = []

    def guess(self) -> list[int]:
        return self.known[len(self.text) : len(self.text) + 7]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of each step."""
    counts: list[int] = []
    step = FastDecoder.step

    def noted(self: FastDecoder, cache: object, tokens: list[int], *rest: object) -> torch.Tensor:
        counts.append(len(tokens))
        return step(self, cache, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FastDecoder, "step", noted)
    yield counts


def said(model: Transformer, prompt: list[int], sampling: Sampling, tokens: int = 90) -> list[int]:
    return [token for (token,) in generate(model, [prompt], tokens, sampling, 3) if token is not None]


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(deadline=None, max_examples=4)
@given(wrong=st.sets(st.integers(1, 159), max_size=30), length=st.integers(1, 120), seed=st.integers(0, 9))
def test_guesses_change_no_token(sampling: Sampling, int8: bool, wrong: set[int], length: int, seed: int) -> None:
    """Right ones, wrong ones, and over the end of the context."""
    model = tiny.transformer(seed, vocabulary=64, context=CONTEXT).eval()
    prepare_weights(model, int8=int8)
    prompt = tiny.ids(length, seed=seed, vocabulary=64).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "guess", lambda _: [])
        expected = said(model, prompt, sampling)
    assert said(model, prompt, sampling) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.inference.slots.Lookup", Oracle)
        patch.setattr(Oracle, "known", [(t + 1) % 64 if i in wrong else t for i, t in enumerate([*prompt, *expected])])
        assert said(model, prompt, sampling) == expected


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_int8_reads_a_text_alike_in_any_row_beside_any_other(length: int) -> None:
    """Short ones by its own weights, long ones by the model's."""
    model = tiny.transformer(vocabulary=64, context=CONTEXT).eval()
    prepare_weights(model, int8=True)
    texts = [tiny.ids(size, seed=size, vocabulary=64).tolist() for size in (length, 20, 50)]
    alone = [token for (token,) in generate(model, texts[:1], 20, SAMPLED, 3)]
    together = [row[0] for row in generate(model, texts, 20, SAMPLED, 3)]
    assert alone == together
    with torch.no_grad():
        first, last = (Slots(model, 3, CONTEXT).join({row: texts[0]})[row] for row in (0, 2))
        whole = model.logits(torch.tensor([texts[0]]))[0, -1]
    assert torch.equal(first, last)
    assert torch.equal(first, PREPARED[model].read(texts[0])[-1]) == (length <= 32)
    off = {8: 0.05, 7: 0.1}[input_bits()]
    torch.testing.assert_close(first, whole, atol=off * whole.abs().max().item(), rtol=0)


@torch.no_grad()
def test_the_logits_after_a_guess_are_those_of_a_step_to_the_bit(counted: list[int]) -> None:
    model = tiny.transformer(vocabulary=64, context=CONTEXT).eval()
    prompt, following = tiny.ids(9, vocabulary=64).tolist(), tiny.ids(100, seed=4, vocabulary=64).tolist()
    found = []
    for known in ([*prompt, *following], []):
        slots = Slots(model, 1, CONTEXT)
        counted.clear()
        slots.join({0: prompt})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Oracle, "known", known)
            slots.lookups[0] = Oracle(prompt)
            found.append(torch.cat([slots.step({0: token}) for token in following]))
        assert len(counted) == 13 if known else len(counted) == 100
    assert torch.equal(*found)


def test_a_text_that_repeats_itself_takes_fewer_steps_than_tokens(counted: list[int]) -> None:
    model = tiny.transformer(vocabulary=64, context=512).eval()
    said = list(generate(model, [[1, 2, 3, 4] * 8], 200, GREEDY))
    assert len(said) == 200 and len(counted) < 100


@torch.no_grad()
def test_a_guess_for_a_text_is_none_for_the_next_in_its_place() -> None:
    model = tiny.transformer(vocabulary=64, context=CONTEXT).eval()
    fresh, used = Slots(model, 1, CONTEXT), Slots(model, 1, CONTEXT)
    used.join({0: [5] * 9})
    used.step({0: 5})
    assert used.ahead is not None and used.ahead.guess[0] == 5
    assert torch.equal(used.join({0: [7, 8]})[0], fresh.join({0: [7, 8]})[0])
    assert torch.equal(used.step({0: 5}), fresh.step({0: 5}))


def test_repeated_text_is_guessed_and_new_text_is_not() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert lookup.guess() == [4, 5, 6]
    lookup.learn(3, 3)
    assert lookup.guess() == [4, 5, 6, 7, 1, 2, 3]  # into the guess itself
    lookup.append(9)
    assert lookup.guess() == []
    assert len(Lookup([5] * 9).guess()) == 3


def test_wrong_guesses_become_rare_and_right_ones_long() -> None:
    lookup, asked = Lookup([5] * 9), 0
    for _ in range(400):
        if guess := lookup.guess():
            asked += 1
            lookup.learn(len(guess), 0)
        lookup.append(5)
    assert 400 // PATIENCE <= asked < 20
    lookup.learn(3, 3)
    for _ in range(9):
        lookup.learn(len(lookup.guess()), len(lookup.guess()))
    assert lookup.most == MOST


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
    scale=st.sampled_from([1e-6, 1, 1e4]),
)
def test_an_8_bit_product_is_near_and_its_rows_ignore_each_other(
    rows: int, inputs: int, outputs: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    x[0] *= scale
    x[-1] = 0
    with torch.inference_mode():
        product = Int8Product(weight)
        whole = product(x)
        assert all(torch.equal(product(x[row : row + 1])[0], whole[row]) for row in range(rows))
        exact = Product(weight)(x)
    # Each weight is off by at most half of a 127th of its row's largest, each input by half of a 127th, or of a 63rd.
    off = {8: 0.009, 7: 0.0125}[input_bits()]
    bound = inputs * x.abs().amax(1)[:, None] * weight.abs().amax(1) * off + 1e-12
    assert ((whole - exact).abs() <= bound).all()
    assert not whole[-1].any()


def test_a_model_that_cannot_be_rounded_is_refused() -> None:
    model = tiny.transformer()
    prepare_weights(model.to(torch.bfloat16))
    assert model not in PREPARED
    with pytest.raises(RecipeError, match="--int8"):
        prepare_weights(model, int8=True)
