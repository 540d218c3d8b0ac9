"""Texts as they grow: a stop is found wherever tokens split it, and no half of a character is shown."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.tokenizer import Tokenizer
from llm.inference.stop import Stop
from llm.serving.answering import _events
from llm.serving.answers import Choice, Piece, Writer, text_of
from llm.serving.engine import Token
from tests.forks import SENTENCES


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(SENTENCES).encode()], vocab_size=330)


def choice_of(tokenizer: Tokenizer, stops: list[str]) -> Choice:
    job: Any = SimpleNamespace(checkpoint=SimpleNamespace(run=SimpleNamespace(tokenizer=tokenizer)), echoed=[])
    return Choice(0, job, stops)


def grown(choice: Choice, ids: list[int]) -> list[str]:
    pieces = []
    for id in ids:
        pieces.append(choice.feed(Token(id)).text)
        if choice.is_stopped:
            return pieces
    return [*pieces, choice.end("length").text]


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("ab🎉é \n"), max_size=30),
    cuts=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9)), max_size=4),
)
def test_a_text_ends_before_the_first_stop_however_tokens_split_it(
    tokenizer: Tokenizer, text: str, cuts: list[tuple[int, int]]
) -> None:
    stops = [stop for begin, size in cuts if (stop := text[begin : begin + size])] + ["nowhere"]
    ids, expected = tokenizer.encode(text), text
    for count in range(len(ids) + 1):
        so_far = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        if found := [at for stop in stops if (at := so_far.find(stop)) >= 0]:
            expected = so_far[: min(found)]
            break
    choice = choice_of(tokenizer, stops)
    assert "".join(grown(choice, ids)) == choice.text == expected
    assert len([token for _, token in choice.tokens]) <= choice.said


def test_each_token_stands_at_its_offset_also_behind_an_unfinished_character(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.id_of("<0xEB>"), *tokenizer.encode("river"), tokenizer.id_of("<0xC3>"), tokenizer.id_of("<0xA9>")]
    choice = choice_of(tokenizer, [])
    grown(choice, [id or 0 for id in ids])
    offsets = [offset for offset, _ in choice.tokens]
    assert choice.text == "\ufffdriveré" and offsets[0] == 0 and offsets[-2:] == [6, 6]
    for offset, token in choice.tokens[1:-2]:
        assert choice.text[offset:].startswith(text_of(tokenizer, token.id))


def test_tokens_have_one_name_each(tokenizer: Tokenizer) -> None:
    names = [text_of(tokenizer, id) for id in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names) and "bytes:\\x65" in names and "e" in names and "\n" in names


def test_long_stops_are_looked_for_no_further_than_the_text_reaches() -> None:
    stop = Stop(["x" * 999 + "y", "ab" * 400])
    assert [stop.feed(piece) for piece in ("a", "x", "xx", "z", "abab", "!")] == ["", "a", "", "xxxz", "", "abab!"]
    stop = Stop(["a" * 999 + chr(65 + number) for number in range(16)])
    assert "".join(stop.feed("a") for _ in range(1500)) == "a" * 501 and stop.held == "a" * 999


def test_an_emoji_of_several_tokens_is_shown_whole_or_not_at_all(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎉b")
    assert len(ids) > 5
    pieces = grown(choice_of(tokenizer, []), ids)
    assert "".join(pieces) == "a🎉b" and "🎉" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    cut = grown(choice_of(tokenizer, []), ids[:-2])  # the answer ends within the character
    assert "".join(cut) == "a\ufffd"


def test_an_event_is_one_line_to_every_reader() -> None:
    for text in ("a\u2028b\u2029c\x85d", "\x0b\x0c\x1c\r\n", "🎉 é"):
        data = Writer.sent({"text": text}).decode()
        assert len(data.splitlines()) == 2 and data.isascii()


def test_a_stream_begins_with_its_role_though_its_first_token_may_begin_a_stop(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, ["XY"])
    choice.job.row, choice.job.prompt, choice.job.echoed = 0, [], []

    async def fed() -> AsyncIterator[tuple[Choice, Piece]]:
        for id in tokenizer.encode("Xab")[-3:]:
            yield choice, choice.feed(Token(id))

    class Noting:
        def event(self, choice: Choice, piece: Piece, finish: str | None, *, is_first: bool) -> bytes:
            return f"{is_first} {piece.text}".encode()

    async def events() -> list[bytes]:
        writer: Any = Noting()
        return [each async for each in _events(writer, fed(), [choice], wants_usage=False)]

    *said, done = asyncio.run(events())
    assert said[0].startswith(b"True") and not any(each.startswith(b"True") for each in said[1:]), said
    assert b"XY" not in b"".join(said) and done.startswith(b"data: [DONE]")
