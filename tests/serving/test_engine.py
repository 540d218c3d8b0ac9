"""None mixed up: a text's bits ignore the texts beside it, whatever their lengths and whenever they join and leave."""

import asyncio
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.inference import fast_decode
from llm.inference.generation import generate
from llm.inference.sampling import Sampling
from llm.inference.slots import Slots
from llm.model.transformer import Transformer
from llm.serving.engine import BusyError, Engine, EngineError, Job, Token
from tests import tiny

GREEDY, SAMPLED = Sampling(temperature=0, repetition_penalty=1), Sampling(temperature=1.0, top_p=0.9, min_p=0.01)
PENALTY = Sampling(temperature=0.7, top_k=20, repetition_penalty=1.3)
CONTEXT = 300  # several parts of the cache: 32, 48, 64 ... 256, 300


def model_of(seed: int = 0, context: int = CONTEXT, **keys: Any) -> Transformer:
    return tiny.transformer(seed, vocabulary=64, context=context, **keys).eval()


def run_of(model: Transformer, name: str = "a") -> Any:
    return SimpleNamespace(model=model, name=name)


def text(length: int, seed: int = 0) -> list[int]:
    return tiny.ids(length, seed=seed, vocabulary=64).tolist()


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("widths", [fast_decode.WIDTHS, ()], ids=["narrow", "always-16"])
@settings(deadline=None, max_examples=25)
@given(
    place=st.integers(0, 15),
    lengths=st.dictionaries(st.integers(0, 15), st.integers(1, 290), max_size=15),
    own=st.sampled_from([1, 5, 30, 120, 126, 200, 254, 270]),
    together=st.booleans(),
)
def test_a_rows_bits_ignore_its_place_and_its_neighbours(
    widths: tuple[int, ...], int8: bool, place: int, lengths: dict[int, int], own: int, together: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_decode, "WIDTHS", widths)
        patch.setattr(fast_decode.FastDecoder, "known_widths", {})
        model, alone, mine = model_of(), text(own), text(own)
        fast_decode.prepare_weights(model, int8=int8)
        single, shared = Slots(model, 1, own + 8), Slots(model, 16)
        if not widths:
            assert single.widths == [16]
        expected = [single.join({0: alone})[0]]
        neighbours = {row: text(length, seed=row) for row, length in lengths.items() if row != place}
        if together:
            found = [shared.join({**neighbours, place: mine})[place]]
        else:
            found = [shared.join({place: mine})[place]]
            for row, said in neighbours.items():
                shared.join({row: said})
        for step in range(6):
            expected.append(single.step({0: step})[0])
            rows = {row: step + row for row in neighbours if step < 5 or row % 2}  # some leave
            logits = dict(zip([*rows, place], shared.step({**rows, place: step}), strict=True))
            found.append(logits[place])
        assert torch.equal(torch.stack(found), torch.stack(expected))


def play(work: Coroutine[Any, Any, Any], engine: Engine) -> Any:
    """Run a coroutine beside the engine."""

    async def both() -> Any:
        engine._wake = asyncio.Event()
        working = asyncio.create_task(engine.run())
        try:
            return await asyncio.wait_for(work, 60)
        finally:
            working.cancel()

    return asyncio.run(both())


async def tokens_of(job: Job) -> list[int]:
    found = []
    while True:
        own, item = await job.out.get()
        assert own is job
        if item is None:
            return found
        if isinstance(item, EngineError):
            raise item
        found.append(item.id)


def job_of(
    engine: Engine, prompt: list[int], tokens: int, sampling: Sampling = GREEDY, seed: int = 0, **also: Any
) -> Job:
    return Job(engine.newest, prompt, tokens, sampling, seed, asyncio.Queue(), **also)


asked = st.tuples(
    st.integers(1, 80),  # the prompt's length
    st.integers(1, 60),  # new tokens
    st.sampled_from([GREEDY, GREEDY, SAMPLED, PENALTY]),
    st.integers(0, 40),  # steps of the loop before it comes
    st.sampled_from([None, None, None, 3, 9]),  # it hangs up after so many tokens
)


@settings(deadline=None, max_examples=20)
@given(requests=st.lists(asked, min_size=2, max_size=24), small=st.booleans(), int8=st.booleans())
def test_answers_are_those_of_each_alone(requests: list[Any], small: bool, int8: bool) -> None:
    """Mixed lengths, settings, joins and leaves; contexts that fill up; more texts than slots."""
    model = model_of(context=80 if small else CONTEXT)
    fast_decode.prepare_weights(model, int8=int8)
    engine = Engine(run_of(model), queue=100, int8=int8)

    async def ask(
        number: int, length: int, tokens: int, sampling: Sampling, delay: int, leaves: int | None
    ) -> list[int]:
        for _ in range(delay):
            await asyncio.sleep(0.001)
        job = job_of(engine, text(length, number), tokens, sampling, number, banned=(5, 6), ends=(7,))
        engine.submit([job])
        found: list[int] = []
        while True:
            _, item = await job.out.get()
            if item is None:
                return found
            assert isinstance(item, Token)
            found.append(item.id)
            if len(found) == leaves:
                engine.cancel(job)
                return found

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(ask(number, *request) for number, request in enumerate(requests)))

    answers = play(all_of_them(), engine)
    for number, ((length, tokens, sampling, _, leaves), answer) in enumerate(zip(requests, answers, strict=True)):
        columns = generate(model, [text(length, number)], tokens, sampling, number, (7,), (5, 6))
        alone = [token for (token,) in columns if token is not None]
        assert answer == alone[:leaves]
    assert engine.running == 0 and not engine.waiting


def test_a_cancelled_text_frees_its_place_by_the_next_step() -> None:
    engine = Engine(run_of(model_of()), queue=100)

    async def act() -> None:
        jobs = [job_of(engine, text(3, number), 10_000) for number in range(17)]
        engine.submit(jobs)
        while engine.running < 16:
            await asyncio.sleep(0.001)
        assert len(engine.waiting) == 1 and not jobs[16].count
        engine.cancel(jobs[4])
        await asyncio.wait_for(jobs[16].out.get(), 5)
        assert jobs[16] in engine.newest.jobs.values() and jobs[4] not in engine.newest.jobs.values()
        said = jobs[4].count
        for job in jobs:
            engine.cancel(job)
        await asyncio.sleep(0.1)
        assert engine.running == 0 and jobs[4].count == said

    play(act(), engine)


def test_a_full_queue_takes_all_of_a_request_or_none() -> None:
    engine = Engine(run_of(model_of()), queue=3)
    engine.submit([job_of(engine, [1], 5) for _ in range(18)])
    with pytest.raises(BusyError, match="18 requests are waiting"):
        engine.submit([job_of(engine, [1], 5) for _ in range(2)])
    assert len(engine.waiting) == 18 and 1 <= engine.retry_after <= 60


def test_a_text_ends_with_the_checkpoint_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    models, step = [model_of(seed) for seed in range(3)], Slots.step

    def slow(slots: Slots, tokens: dict[int, int]) -> Any:
        time.sleep(0.002)  # so that the first text still goes on when the third begins
        return step(slots, tokens)

    monkeypatch.setattr(Slots, "step", slow)
    engine = Engine(run_of(models[0], "0"), queue=100)

    async def act() -> list[list[int]]:
        answers = []
        for number in range(3):
            if number:
                assert engine.can_swap()
                engine.swap(run_of(models[number], str(number)))
            job = job_of(engine, text(4), 60)
            engine.submit([job])
            answers.append(asyncio.create_task(tokens_of(job)))
            await asyncio.sleep(0.01)
        assert len(engine.checkpoints) == 3 and not engine.can_swap()
        found = await asyncio.gather(*answers)
        await asyncio.sleep(0.05)
        assert [each.run.name for each in engine.checkpoints] == ["2"]
        return found

    found = play(act(), engine)
    assert found == [[token for (token,) in generate(model, [text(4)], 60, GREEDY)] for model in models]
    assert found[0] != found[1]


def test_a_text_that_was_encoded_for_a_checkpoint_that_is_gone_is_answered_by_it() -> None:
    models = [model_of(seed) for seed in range(2)]
    engine = Engine(run_of(models[0], "0"), queue=100)

    async def act() -> list[int]:
        job = job_of(engine, text(4), 20)
        engine.swap(run_of(models[1], "1"))
        await asyncio.sleep(0.05)
        assert [each.run.name for each in engine.checkpoints] == ["1"]
        engine.submit([job])
        return await asyncio.wait_for(tokens_of(job), 20)

    assert play(act(), engine) == [token for (token,) in generate(models[0], [text(4)], 20, GREEDY)]


def test_a_client_that_leaves_while_a_checkpoint_is_swapped_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Slots.step

    def slow(slots: Slots, tokens: dict[int, int]) -> Any:
        time.sleep(0.02)  # the step in which the client leaves
        return step(slots, tokens)

    monkeypatch.setattr(Slots, "step", slow)
    engine = Engine(run_of(model_of(), "0"), queue=9)

    async def act() -> list[int]:
        leaves, stays = job_of(engine, text(4), 60), job_of(engine, text(5), 9)
        engine.submit([leaves, stays])
        answer = asyncio.create_task(tokens_of(stays))
        await asyncio.sleep(0.05)
        engine.cancel(leaves)
        engine.swap(run_of(model_of(1), "1"))
        found = await answer
        await asyncio.sleep(0.05)
        assert [each.run.name for each in engine.checkpoints] == ["1"]
        return found

    assert len(play(act(), engine)) == 9


def test_a_model_that_fails_ends_its_requests_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(run_of(model_of()), queue=9)

    async def act() -> list[int]:
        whole = Slots.join
        monkeypatch.setattr(Slots, "join", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        job = job_of(engine, [1], 5)
        engine.submit([job])
        with pytest.raises(EngineError, match="no memory"):
            await tokens_of(job)
        monkeypatch.setattr(Slots, "join", whole)
        job = job_of(engine, [1], 5)
        engine.submit([job])
        return await tokens_of(job)

    assert len(play(act(), engine)) == 5
    assert engine.counts["failures"] == 1


def test_log_probabilities_are_the_models() -> None:
    model = model_of()
    engine = Engine(run_of(model), queue=9)
    prompt = text(20)

    async def act() -> tuple[Job, list[Token]]:
        job = job_of(engine, prompt, 6, SAMPLED, likeliest=4, echo=True)
        engine.submit([job])
        found = []
        while isinstance(item := (await job.out.get())[1], Token):
            found.append(item)
        return job, found

    job, found = play(act(), engine)
    ids = [*prompt, *(token.id for token in found)]
    with torch.no_grad():
        lines = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    assert [token.id for token in job.echoed] == prompt and job.echoed[0].logprob is None
    for index, token in enumerate([*job.echoed[1:], *found]):
        assert token.logprob == pytest.approx(lines[index, ids[index + 1]].item(), abs=1e-4)
        values, best = lines[index].topk(4)
        assert list(token.likeliest.values()) == pytest.approx(values.tolist(), abs=1e-4)
        assert list(token.likeliest) == best.tolist()
