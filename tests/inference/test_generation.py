"""Generated text is what the model would say without a cache: alone or side by side, within its context or past it."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm.inference.fast_decode import FastDecoder, silu
from llm.inference.generation import Sampling, choose, continuations, generate
from llm.inference.slots import prefill
from llm.model.transformer import Cache, Family, Transformer
from tests import tiny

CONTEXT = 16
GREEDY = Sampling(temperature=0, repetition_penalty=1)
PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8]]
SPELLED: Any = SimpleNamespace(decode=str, ends=(), banned=())  # a tokenizer whose text is the list of ids
shapes = pytest.mark.parametrize("keys", [{}, {"kv_heads": 2}, {"tied": False, "layers": 1}])


def rows(
    model: Transformer, prompts: list[list[int]], tokens: int, sampling: Sampling = GREEDY, **how: int
) -> list[list[int]]:
    """New tokens of each prompt."""
    columns = list(generate(model, prompts, tokens, sampling, **how))
    return [[token for token in row if token is not None] for row in zip(*columns, strict=True)]


@torch.no_grad()
def read_again(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens without a cache: all of the text is read for each, its last half once it is full."""
    text, new = prompt[-CONTEXT:], []
    for _ in range(tokens):
        new.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
        text = [*text, new[-1]]
        text = text[-(CONTEXT // 2) :] if len(text) > CONTEXT else text
    return new


@shapes
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_for_rows_of_any_lengths(keys: dict[str, int]) -> None:
    model = tiny.transformer(**keys)
    texts = [list(prompt) for prompt in PROMPTS]
    cache = Cache(model.shape, len(texts), CONTEXT, torch.device("cpu"), torch.float32)
    logits = [prefill(model, cache, texts)]
    for following in tiny.ids(9, len(texts)):
        texts = [[*text, int(token)] for text, token in zip(texts, following, strict=True)]
        cache.at(torch.tensor([[len(text) - 1] for text in texts]))
        logits.append(model.logits(following[:, None], cache)[:, -1])
    assert max(map(len, texts)) == CONTEXT
    for row, text in enumerate(texts):
        alone = model.logits(torch.tensor([text]))[0, -10:]
        assert torch.allclose(torch.stack([each[row] for each in logits]), alone, rtol=0, atol=1e-5)


@shapes
@pytest.mark.parametrize("family", [Family(), Family("llama", rope_theta=5e5, norm_eps=1e-5)], ids=["qwen3", "llama"])
@torch.no_grad()
def test_decoding_says_the_uncached_logits_for_rows_of_any_lengths(keys: dict[str, int], family: Family) -> None:
    """With another layout of the weights."""
    model = tiny.stirred(Transformer(tiny.shape(**keys), tiny.VOCABULARY, family=family))
    for prompts in (PROMPTS, [[3, 1, 4], [5, 9, 2]], [[7]]):
        texts = [list(prompt) for prompt in prompts]
        cache = Cache(model.shape, len(texts), CONTEXT, torch.device("cpu"), torch.float32)
        ahead = FastDecoder(model)
        for _ in range(2):  # a cache may be filled anew
            texts = [list(prompt) for prompt in prompts]
            prefill(model, cache, texts)
            while max(map(len, texts)) < CONTEXT:
                following = tiny.ids(len(texts), seed=len(texts[0]))
                texts = [[*text, int(token)] for text, token in zip(texts, following, strict=True)]
                alone = torch.stack([model.logits(torch.tensor([text]))[0, -1] for text in texts])
                places = [len(text) - 1 for text in texts]
                assert torch.allclose(ahead.step(cache, following.tolist(), places), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_is_filled_anew_remembers_nothing() -> None:
    model = tiny.transformer()
    used, fresh = (Cache(model.shape, 3, CONTEXT, torch.device("cpu"), torch.float32) for _ in range(2))
    prefill(model, used, tiny.ids(3, CONTEXT).tolist())
    assert torch.equal(prefill(model, used, PROMPTS), prefill(model, fresh, PROMPTS))


@shapes
def test_greedy_text_is_what_reading_all_of_it_again_would_give(keys: dict[str, int]) -> None:
    model = tiny.transformer(seed=11, vocabulary=128, **keys)
    found = rows(model, PROMPTS, 40)  # the context is filled several times, by each row at another moment
    assert found == [read_again(model, prompt, 40) for prompt in PROMPTS]
    assert all(len(set(row)) > 1 for row in found)  # so none just repeats itself


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_a_prompt_may_fill_the_context_or_be_longer(length: int) -> None:
    model, prompt = tiny.transformer(), tiny.ids(length).tolist()
    assert rows(model, [prompt], 20) == [read_again(model, prompt, 20)]
    assert rows(model, [prompt, [7]], 20) == [read_again(model, prompt, 20), read_again(model, [7], 20)]


def test_the_least_context_goes_on_for_ever() -> None:
    model = tiny.transformer(context=2)
    assert len(rows(model, [[1], [2, 3]], 9)[1]) == 9


def test_a_seed_says_the_same_again_and_another_something_else() -> None:
    model, sampling = tiny.transformer(), Sampling(temperature=1.0)
    first = rows(model, PROMPTS, 30, sampling, seed=5)
    torch.manual_seed(7)
    assert rows(model, PROMPTS, 30, sampling, seed=5) == first
    assert rows(model, PROMPTS, 30, sampling, seed=6) != first


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-40),
        Sampling(temperature=1e-320),
    ],
)
def test_the_narrowest_filters_are_greedy(sampling: Sampling) -> None:
    model = tiny.transformer()
    assert rows(model, PROMPTS, 30, sampling) == rows(model, PROMPTS, 30, Sampling(temperature=0))


def drawn(logits: Tensor, sampling: Sampling, times: int = 2000, seen: list[int] | None = None) -> Tensor:
    """How often each token is chosen: (V,)."""
    occurred = [set(seen or [])] * times
    chosen = choose(logits.expand(times, -1), occurred, sampling, [torch.Generator().manual_seed(1)] * times)
    return chosen.bincount(minlength=len(logits))


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for temperature in (1.0, 0.5, 2.0):
        expected = (shares ** (1 / temperature)) / (shares ** (1 / temperature)).sum()
        found = drawn(shares.log() + 3, Sampling(temperature=temperature, min_p=0), 10_000) / 10_000
        assert torch.allclose(found, expected, atol=0.02)  # four standard deviations


def test_each_filter_keeps_what_it_says() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()

    def kept(**filters: float) -> set[int]:
        return set(drawn(logits, Sampling(temperature=1.0, **filters)).nonzero().flatten().tolist())

    assert kept() == {0, 1, 2, 3}
    assert [kept(top_k=k) for k in (1, 2, 3, 4, 100)] == [{1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    assert [kept(top_p=p) for p in (0.4, 0.6, 0.9, 0.99)] == [{1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3}]
    assert [kept(min_p=p) for p in (0.7, 0.5, 0.2, 0.05)] == [{1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3}]
    assert kept(top_k=3, top_p=0.8) == {1, 3}  # 0.5 and 0.3 of what top_k left are enough


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9),
    temperature=st.sampled_from([0.0, 0.01, 0.8, 10.0]),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    penalty=st.floats(0.5, 5.0),
)
def test_some_token_always_stays(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    masked = torch.tensor([*logits, -torch.inf])  # the last one is banned
    counts = drawn(masked, Sampling(temperature, top_k, top_p, min_p, penalty), times=5, seen=[0])
    assert counts.sum() == 5
    assert counts[-1] == 0


def test_a_repetition_penalty_forbids_loops() -> None:
    """An untrained model with tied embeddings says its last token for ever."""
    model = Transformer(tiny.shape(dim=64), tiny.VOCABULARY)
    assert rows(model, [[5]], 12) == [[5] * 12]
    punished = rows(model, [[5]], 12, Sampling(temperature=0, repetition_penalty=1e6))[0]
    assert all(a != b for a, b in itertools.pairwise([5, *punished]))
    assert len(set(punished)) > 6


def test_a_penalty_makes_what_occurred_less_likely_whatever_its_sign() -> None:
    logits = torch.tensor([1.0, -1.0, 1.0, -1.0])
    often = drawn(logits, Sampling(temperature=1.0, repetition_penalty=2.0), seen=[0, 1])
    assert often[0] < 0.8 * often[2]
    assert often[1] < 0.8 * often[3]


def test_a_row_stops_at_the_end_while_the_others_go_on() -> None:
    model = tiny.transformer()
    free = rows(model, PROMPTS, 12)
    end = free[0][4]
    columns = list(generate(model, PROMPTS, 12, GREEDY, ends=(end,)))
    for row, said in zip(zip(*columns, strict=True), free, strict=True):
        stop = said.index(end) if end in said else len(said)
        assert list(row) == [*said[:stop], *[None] * (len(columns) - stop)]
    assert len(columns) == 1 + max(said.index(end) if end in said else 11 for said in free)


def test_generation_ends_when_every_row_has() -> None:
    model = tiny.transformer()
    end = rows(model, [[3, 1, 4]], 1)[0][0]
    assert list(generate(model, [[3, 1, 4], [3, 1, 4]], 50, GREEDY, ends=(end,))) == [[None, None]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_occur(temperature: float) -> None:
    model = tiny.transformer()
    banned = tuple(range(0, tiny.VOCABULARY, 2))
    sampling = Sampling(temperature=temperature)
    assert any(token in banned for row in rows(model, PROMPTS, 30, sampling) for token in row)
    columns = generate(model, PROMPTS, 30, sampling, banned=banned)
    assert not any(token in banned for column in columns for token in column)


def test_no_tokens_asked_for_is_no_text() -> None:
    assert continuations(tiny.transformer(), SPELLED, PROMPTS, 0, GREEDY) == ["[]", "[]", "[]"]


def test_continuations_are_the_new_tokens_as_text() -> None:
    model = tiny.transformer()
    assert continuations(model, SPELLED, PROMPTS, 5, GREEDY) == [str(row) for row in rows(model, PROMPTS, 5)]


def test_silu_of_a_row_ignores_the_rows_beside_it_with_any_number_of_threads() -> None:
    x = torch.randn(45, 4088, generator=torch.Generator().manual_seed(0)).chunk(2, dim=-1)[0]
    before = torch.get_num_threads()
    for threads in (1, 3, before):
        torch.set_num_threads(threads)
        try:
            found = [silu(x), silu(x[:19])]
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0][:19], found[1])
        assert all(torch.equal(row, silu(one)) for row, one in zip(found[0][:, None], x[:, None], strict=True))
