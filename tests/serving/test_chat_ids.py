"""The model reads of a conversation exactly what the run's template writes, whatever is said in it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

import llm.serving.engine
from llm.data.chat_template import template_of
from llm.data.conversations import Message
from llm.data.tokenizer import Tokenizer
from llm.interop.parity import conversations
from llm.run_folder.loaded_run import LoadedRun
from tests.data.test_conversations import CHATML, foreign, tough_dialogues
from tests.serving.conftest import served


class Ear:
    """In the slots' place: hears what the model would read, and ends the answer."""

    heard: list[list[int]] = []  # noqa: RUF012

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model

    def join(self, texts: dict[int, list[int]]) -> dict[int, Tensor]:
        self.heard += [list(text) for text in texts.values()]
        return {
            row: torch.nn.functional.one_hot(torch.tensor(self.model.end), self.model.vocabulary).float()
            for row in texts
        }


def askable(messages: list[Message]) -> list[Message]:
    """The conversation without what is refused: blank messages, NUL, an assistant's at the end."""
    kept = [{**each, "content": each["content"].replace("\0", "0")} for each in messages]
    kept = [each if each["content"].strip() else {**each, "content": f"x{each['content']}"} for each in kept]
    return kept if kept[-1]["role"] == "user" else [*kept, {"role": "user", "content": "\n and? "}]


def sent(messages: list[Message], draw: random.Random) -> list[dict[str, Any]]:
    """The same, some of it as parts, and the system's by its other name."""
    rows: list[dict[str, Any]] = []
    for each in messages:
        content: Any = each["content"]
        if draw.random() < 0.3:
            cut = draw.randint(0, len(content))
            content = [{"type": "text", "text": part} for part in (content[:cut], content[cut:])]
        role = "developer" if each["role"] == "system" and draw.random() < 0.5 else each["role"]
        rows.append({"role": role, "content": content})
    return rows


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    Ear.heard = []
    monkeypatch.setattr(llm.serving.engine, "Slots", Ear)
    yield Ear.heard


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["own", "chatml"])
def test_the_model_reads_what_the_template_writes(
    talk_run: LoadedRun, heard: list[list[int]], kind: str, count: int
) -> None:
    tokenizer: Tokenizer = talk_run.tokenizer if kind == "own" else foreign(CHATML)  # type: ignore[assignment]
    template, draw = template_of(tokenizer), random.Random(2)
    half = count // 2
    tough = conversations(tokenizer, half) + tough_dialogues(tokenizer, count - half, marks=True)
    model: Any = SimpleNamespace(
        shape=SimpleNamespace(context=1 << 20), end=template.ends[0], vocabulary=tokenizer.vocab_size
    )
    with (
        served(replace(talk_run, tokenizer=tokenizer, model=model)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for messages in map(askable, tough):
            answer = client.post("/v1/chat/completions", json={"messages": sent(messages, draw), "temperature": 0})
            assert answer.status_code == 200, answer.text
            expected = template.prompt(messages)
            assert answer.json()["usage"]["prompt_tokens"] == len(expected)
            assert heard[-1] == expected, str(messages)[:200]
    assert len(heard) == count
