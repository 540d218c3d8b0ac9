"""What OpenAI's own client gets: the text of `llm.sample`, streams, chat, stops, seeds, log-probabilities."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from llm.data.chat_template import OwnTemplate, template_of
from llm.data.tokenizer import Tokenizer
from llm.inference.generation import continuations
from llm.inference.sampling import Sampling
from llm.run_folder.loaded_run import LoadedRun
from llm.serving.answering import Limits
from tests.forks import SENTENCES, run, script
from tests.serving.conftest import Served, served
from tests.test_evaluate import TASK, number

PROMPT = "The river"


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> Iterator[openai.OpenAI]:
    with client_of(tiny_server) as found:
        yield found


@pytest.fixture(scope="module")
def talker(talk_server: Served) -> Iterator[openai.OpenAI]:
    with client_of(talk_server) as found:
        yield found


def ask(client: openai.OpenAI, prompt: Any = PROMPT, **settings: Any) -> Any:
    known = {"temperature": 0, "max_tokens": 30} | settings
    extra = {name: known.pop(name) for name in ("top_k", "min_p", "repetition_penalty", "ignore_eos") if name in known}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **known)


def test_greedy_text_is_that_of_sample_to_the_letter(client: openai.OpenAI, here: Path) -> None:
    for prompt in (PROMPT, "", "It was founded in 1897, été"):
        ended = run(script("module:llm.sample", "tiny", "--temperature=0", "--tokens=150", "--prompt", prompt), here)
        assert ended.status == 0, ended.err
        found = ask(client, prompt, max_tokens=150)  # the context of 64 is filled twice
        assert f"{prompt}{found.choices[0].text}\n" == ended.out
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 150
        assert found.system_fingerprint.startswith("tiny/step-")


def test_a_seed_is_that_of_sample_too_and_n_are_several(
    client: openai.OpenAI, tiny_run: LoadedRun, tiny_server: Served
) -> None:
    ids = [tiny_run.tokenizer.bos, *tiny_run.tokenizer.encode(PROMPT)]
    expected = continuations(tiny_run.model, tiny_run.tokenizer, [ids] * 3, 30, Sampling(temperature=1.0, top_p=0.9), 7)
    for _ in range(2):
        found = ask(client, temperature=1.0, top_p=0.9, seed=7, n=3)
        assert [each.text for each in found.choices] == expected
        assert [each.index for each in found.choices] == [0, 1, 2] and len(set(expected)) == 3
    assert ask(client, temperature=1.0, seed=8).choices[0].text != ask(client, temperature=1.0, seed=9).choices[0].text
    assert ask(client, temperature=1.0).choices[0].text != ask(client, temperature=1.0).choices[0].text
    settings = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.2, "temperature": 0.7}
    (expected,) = continuations(tiny_run.model, tiny_run.tokenizer, [ids], 30, Sampling(**settings), 4)  # type: ignore[arg-type]
    assert ask(client, seed=4, **settings).choices[0].text == expected
    tiny_server.idle()


def test_an_answer_that_ignores_its_end_has_all_its_tokens(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"n": 8, "temperature": 2.0, "max_tokens": 200, "seed": 1}
    assert "stop" in [each.finish_reason for each in ask(client, **settings).choices]
    whole = ask(client, **settings, ignore_eos=True)
    assert {each.finish_reason for each in whole.choices} == {"length"} and whole.usage.completion_tokens == 8 * 200


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 2, "echo": True}
    whole = ask(client, **settings)
    texts: dict[int, str] = {0: "", 1: ""}
    logprobs: dict[int, list[float | None]] = {0: [], 1: []}
    ends: dict[int, list[str]] = {0: [], 1: []}
    usage, events = None, 0
    for event in ask(client, stream=True, stream_options={"include_usage": True}, **settings):
        events += 1
        usage = event.usage or usage
        for each in event.choices:
            texts[each.index] += each.text
            logprobs[each.index] += each.logprobs.token_logprobs
            ends[each.index] += [each.finish_reason] if each.finish_reason else []
    for each in whole.choices:
        assert texts[each.index] == each.text and each.text.startswith(PROMPT)
        assert logprobs[each.index] == each.logprobs.token_logprobs
        assert ends[each.index] == [each.finish_reason]
    assert usage is not None and usage == whole.usage and events > 0.6 * usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop(client: openai.OpenAI, stream: bool) -> None:
    free = ask(client).choices[0]
    stop = free.text[9:12]
    found = ask(client, stop=[stop, "nowhere"], logprobs=1, stream=stream)
    if stream:
        events = [event.choices[0] for event in found]
        text = "".join(each.text for each in events)
        tokens = [token for each in events for token in each.logprobs.tokens]
        finish = events[-1].finish_reason
    else:
        text, tokens, finish = found.choices[0].text, found.choices[0].logprobs.tokens, found.choices[0].finish_reason
    assert text == free.text[: free.text.index(stop)]
    assert finish == "stop"
    assert "".join(tokens).startswith(text) and not "".join(tokens[:-1]).startswith(text + stop)


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI, tiny_run: LoadedRun) -> None:
    found = ask(client, max_tokens=12, logprobs=5, echo=True, repetition_penalty=1).choices[0].logprobs
    tokenizer = tiny_run.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    for _ in range(12):
        with torch.no_grad():
            lines = tiny_run.model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        ids.append(int(lines[-1].index_fill(0, torch.tensor(tokenizer.banned), -torch.inf).argmax()))
    said = lines.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[0] is None and found.token_logprobs[1:] == pytest.approx(said, abs=1e-4)
    assert len(found.tokens) == len(ids) == len(found.text_offset)
    for top, line, token in zip(found.top_logprobs[1:], lines, found.tokens[1:], strict=True):
        assert sorted(top.values())[-5:] == pytest.approx(sorted(line.topk(5).values.tolist()), abs=1e-4)
        assert token in top


def test_prompts_may_be_several_and_ids(client: openai.OpenAI, tiny_run: LoadedRun) -> None:
    tokenizer = tiny_run.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    one = ask(client).choices[0].text
    found = ask(client, [PROMPT, "His", PROMPT], n=2)
    assert [each.text for each in found.choices][0::4] == [one, one] and len(found.choices) == 6
    assert ask(client, ids).choices[0].text == ask(client, [ids, [3]]).choices[0].text == one
    only = ask(client, [ids], max_tokens=0, echo=True, logprobs=0).choices[0]
    assert only.text == PROMPT and len(only.logprobs.tokens) == len(ids)


def test_chat_is_the_runs_own_template(talker: openai.OpenAI, talk_run: LoadedRun, talk_server: Served) -> None:
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "The river?"}]
    template = template_of(talk_run.tokenizer)
    (expected,) = continuations(
        talk_run.model, talk_run.tokenizer, [template.prompt(messages)], 40, Sampling(temperature=0), 0, template
    )
    settings: dict[str, Any] = {"model": "talk", "messages": messages, "temperature": 0, "max_completion_tokens": 40}
    whole = talker.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason in ("stop", "length")
    entries = whole.choices[0].logprobs.content
    assert b"".join(bytes(each.bytes) for each in entries).decode(errors="replace") == expected
    assert all(len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob >= each.logprob - 1e-6 for each in entries)
    nothing = {
        "tools": None,
        "tool_choice": "none",
        "functions": [],
        "parallel_tool_calls": None,
        "modalities": ["text"],
    }
    asked = talker.chat.completions.create(**settings, extra_body=nothing)
    assert asked.choices[0].message.content == expected
    with pytest.raises(openai.BadRequestError, match="tools"):
        talker.chat.completions.create(**settings, extra_body={"tools": [{"type": "function"}]})
    stream = list(talker.chat.completions.create(**settings, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in stream) == expected
    assert stream[0].choices[0].delta.role == "assistant"
    parts: Any = [{"role": "developer", "content": "Be short."},
                  {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "river?"}]}]  # fmt: skip
    again = talker.chat.completions.create(**{**settings, "messages": parts})
    assert again.choices[0].message.content == expected
    unlimited = talker.chat.completions.create(model="talk", messages=messages, seed=1)
    assert unlimited.usage and unlimited.usage.total_tokens <= talk_run.model.shape.context + 1
    talk_server.idle()


def test_the_oldest_exchanges_are_left_out_where_that_is_asked_for(talker: openai.OpenAI, talk_run: LoadedRun) -> None:
    system: Any = [{"role": "system", "content": "Be short."}]
    old: Any = [{"role": "user", "content": "The river? " * 9}, {"role": "assistant", "content": "It rises. " * 9}]
    new: Any = [{"role": "user", "content": "And the sea?"}]
    settings: dict[str, Any] = {"model": "talk", "temperature": 0, "max_tokens": 9}
    with pytest.raises(openai.BadRequestError) as refused:
        talker.chat.completions.create(messages=[*system, *old, *new], **settings)
    assert refused.value.code == "context_length_exceeded"
    auto = {"truncation": "auto"}
    found = talker.chat.completions.create(messages=[*system, *old, *new], extra_body=auto, **settings)
    assert found.usage and found.usage.prompt_tokens == len(template_of(talk_run.tokenizer).prompt([*system, *new]))
    alone = talker.chat.completions.create(messages=[*system, *new], **settings)
    assert found.choices[0].message.content == alone.choices[0].message.content
    asked = []
    prompt = OwnTemplate.prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnTemplate, "prompt", lambda *given: asked.append(1) or prompt(*given))
        many = talker.chat.completions.create(messages=[*system, *old * 500, *new], extra_body=auto, **settings)
    assert many.choices[0].message.content == alone.choices[0].message.content and len(asked) < 20
    with pytest.raises(openai.BadRequestError, match="shorten it") as refused:
        long: Any = [{"role": "user", "content": "The river? " * 90}]
        talker.chat.completions.create(messages=long, extra_body=auto, **settings)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("what", ["chat", "completions"])
def test_others_are_answered_while_a_long_text_is_encoded(talk_server: Served, what: str) -> None:
    held, told = threading.Event(), threading.Event()

    def waiting(act: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any) -> Any:
            held.set()
            assert told.wait(20)
            return act(*given)

        return wait

    said = {"messages": [{"role": "user", "content": "The river"}]} if what == "chat" else {"prompt": "The river"}
    url = f"{talk_server.url}/v1/{'chat/' * (what == 'chat')}completions"
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(OwnTemplate, "prompt", waiting(OwnTemplate.prompt))
        patch.setattr(Tokenizer, "encode", waiting(Tokenizer.encode))
        answer = pool.submit(httpx.post, url, json={**said, "max_tokens": 2}, timeout=30)
        assert held.wait(20) and httpx.get(f"{talk_server.url}/health", timeout=10).status_code == 200
        told.set()
        assert answer.result().status_code == 200


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "assistant", "content": "hi"}], "user is expected"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "must be a user's"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([{"role": "tool", "content": "a"}], "messages"),
        ([{"role": "user", "content": "The river " * 100}], "more than the context of 128"),
    ],
)
def test_a_conversation_that_cannot_be_is_refused(talker: openai.OpenAI, messages: Any, told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        talker.chat.completions.create(model="talk", messages=messages)
    if "context" in told:
        assert refused.value.code == "context_length_exceeded"


def test_refusals_say_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="was not trained on conversations") as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert refused.value.code == "no_chat_template"
    with pytest.raises(openai.BadRequestError, match="more than the context of 64") as refused:
        ask(client, "river " * 200)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        client.completions.create(model="gpt-9", prompt="a")
    for settings in ({"presence_penalty": 1.0}, {"logit_bias": {"5": 1}}, {"suffix": "x"}, {"best_of": 4}, {"n": 17}):
        with pytest.raises(openai.BadRequestError):
            ask(client, **settings)
    with pytest.raises(openai.BadRequestError, match='"tools" is not known here'):
        client.completions.create(model="tiny", prompt="a", extra_body={"tools": []})
    assert [each.id for each in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_place(tiny_server: Served, stream: bool) -> None:
    engine = tiny_server.server.engine
    tiny_server.idle()
    body = {"prompt": PROMPT, "max_tokens": 4000, "temperature": 0, "n": 4, "stream": stream}
    with httpx.Client(timeout=httpx.Timeout(60, read=None if stream else 0.5)) as client:
        try:
            with client.stream("POST", f"{tiny_server.url}/v1/completions", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data:") and engine.running > 0
        except httpx.ReadTimeout:
            assert not stream
    until = time.monotonic() + 2
    while engine.running:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_an_answer_ends_at_its_time_and_a_full_queue_says_when(tiny_run: LoadedRun) -> None:
    with served(tiny_run, queue=2, limits=Limits(tokens=1 << 20, seconds=4.0)) as server, client_of(server) as client:
        answers: list[Any] = []

        def one() -> None:
            answers.append(ask(client, max_tokens=1 << 20))

        threads = [threading.Thread(target=one) for _ in range(18)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        engine = server.server.engine
        while engine.running + len(engine.waiting) < 18 and time.monotonic() < until:
            time.sleep(0.001)
        with pytest.raises(openai.RateLimitError) as full:
            ask(client)
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        for thread in threads:
            thread.join()
        assert len(answers) == 18 and {each.choices[0].finish_reason for each in answers} == {"length"}
        with pytest.raises(openai.BadRequestError, match="find room here"):
            ask(client, ["a"] * 19)
        assert ask(client).choices[0].text


def test_what_the_page_asks_for(client: openai.OpenAI, tiny_server: Served, tiny_run: LoadedRun) -> None:
    assert ask(client).choices[0].text
    about = httpx.get(f"{tiny_server.url}/run").json()
    assert about["run"] == "tiny" and about["state"] == "finished" and about["context"] == 64 and not about["chat"]
    assert about["curve"]["loss"][-1][0] == 30 and about["settings"]["min_p"]["default"] == 0.05
    page = httpx.get(f"{tiny_server.url}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert httpx.get(f"{tiny_server.url}/health").json()["status"] == "ok"
    lines = httpx.get(f"{tiny_server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["onetext_generated_tokens_total"]) > 0 and values["onetext_slots"] == "16"
    assert int(values['onetext_requests_total{code="200"}']) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_by_the_server_finds_what_evaluate_finds(tiny_server: Served, here: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="install the extra `eval`")
    pytest.importorskip("tenacity", reason="install 'lm-eval[api]'")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    (tmp_path / "own.yaml").write_text(TASK.format(file=tmp_path / "own.jsonl"))
    folder = sorted((here / "runs/tiny/checkpoints").glob("step-*"))[-1]
    found = simple_evaluate(
        "local-completions",
        model_args=f"model=tiny,base_url={tiny_server.url}/v1/completions,tokenizer={folder},max_length=64",
        tasks=["own_text"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0,
    )  # fmt: skip
    ours = run(script("module:llm.evaluate", "tiny/newest", "--text", str(tmp_path / "own.jsonl"), "--alone"), here)
    perplexity = number(ours.out, "perplexity a word")
    assert found["results"]["own_text"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)


def test_a_swapped_checkpoint_names_itself(tiny_run: LoadedRun, here: Path) -> None:
    assert json.loads((here / "runs/tiny/status.json").read_text())["status"] == 0
    with served(tiny_run) as server, client_of(server) as client:
        assert ask(client).system_fingerprint == tiny_run.name == client.models.list().data[0].checkpoint  # type: ignore[attr-defined]


def test_a_prompt_that_is_only_scored_ends_by_its_length(tiny_server: Served) -> None:
    asked = {"prompt": "thclas\n", "max_tokens": 0, "echo": True, "temperature": 1.0, "min_p": 0}
    for seed in range(30):
        found = httpx.post(f"{tiny_server.url}/v1/completions", json={**asked, "seed": seed}, timeout=30).json()
        assert found["choices"][0]["finish_reason"] == "length"
