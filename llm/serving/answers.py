"""Answers as OpenAI's API writes them: whole, or as events of a stream."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from llm.data.tokenizer import SPACE, TextStream, Tokenizer
from llm.inference.stop import Stop
from llm.serving.engine import Job, Token


def text_of(tokenizer: Tokenizer, id: int) -> str:
    """A name for a token that no other token has.

    That is its text, or a control's name, or bytes:\\x.. for bytes that are no whole character, or one with a piece.
    """
    data, piece = tokenizer.bytes_of(id), tokenizer.piece(id)
    try:
        text = data.decode() if data else piece
    except UnicodeDecodeError:
        text = ""
    twice = piece == f"<0x{data.hex().upper()}>" and tokenizer.id_of(text.replace(" ", SPACE)) is not None
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if twice or not text else text


@dataclass
class Piece:
    """Newly generated text of a choice, and its tokens, each with its offset in the text."""

    text: str
    tokens: list[tuple[int, Token]]


class Choice:
    """The text of one job as it grows, up to a stop text. Tokens are told as soon as their text is."""

    def __init__(self, index: int, job: Job, stops: list[str]) -> None:
        self.index, self.job, self.finish = index, job, ""
        self._tokenizer = job.checkpoint.run.tokenizer
        self._stream, self._stop = TextStream(self._tokenizer), Stop(stops)
        self._pending: list[tuple[int, Token]] = []
        self._fed = self._shown = self.said = 0
        self.text = ""
        self.tokens: list[tuple[int, Token]] = []

    def echo(self, prompt: str) -> Piece:
        """The prompt as the first part of the answer."""
        stream, found = TextStream(self._tokenizer), []
        for token in self.job.echoed:
            text = stream.feed(token.id)
            found.append((self._offset(text, token), token))
            self._fed += len(text)
        self._fed = self._shown = len(prompt)
        return self._grown(prompt, found)

    def feed(self, token: Token) -> Piece:
        self.said += 1
        text = self._stream.feed(token.id)
        self._pending.append((self._offset(text, token), token))
        self._fed += len(text)
        return self._release(self._stop.feed(text))

    def _offset(self, text: str, token: Token) -> int:
        """Where the token begins: in `text`, which it brings to light, a sign for unfinished bytes may be before it."""
        own = self._tokenizer.bytes_of(token.id).decode(errors="replace")
        return self._fed + (len(text) - len(own) if own and text.endswith(own) else 0)

    def end(self, finish: str) -> Piece:
        """The text that was held back."""
        rest = self._stop.feed(self._stream.flush()) + self._stop.held
        self._stop.held = ""
        self.finish = "stop" if self._stop.over else finish
        return self._release(rest)

    @property
    def is_stopped(self) -> bool:
        return self._stop.over

    def _release(self, text: str) -> Piece:
        self._shown += len(text)
        everything = not self._stop.over and not self._stop.held
        count = sum(everything or offset < self._shown for offset, _ in self._pending)
        tokens, self._pending = self._pending[:count], self._pending[count:]
        return self._grown(text, tokens)

    def _grown(self, text: str, tokens: list[tuple[int, Token]]) -> Piece:
        self.text += text
        self.tokens += tokens
        return Piece(text, tokens)


@dataclass
class Writer:
    """Formats one request's answer. `model` names the run, `fingerprint` the checkpoint that generates all of it."""

    model: str
    fingerprint: str
    tokenizer: Tokenizer
    is_chat: bool
    has_logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        about = {"id": name, "object": kind, "created": self.created, "model": self.model}
        return about | {"system_fingerprint": self.fingerprint}

    def whole(self, choices: list[Choice], usage: dict[str, int]) -> dict[str, Any]:
        rows = []
        for each in choices:
            said: dict[str, Any] = {"text": each.text}
            if self.is_chat:
                said = {"message": {"role": "assistant", "content": each.text, "refusal": None}}
            rows.append(
                {"index": each.index, **said, "logprobs": self.logprobs(each.tokens), "finish_reason": each.finish}
            )
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head(kind), "choices": rows, "usage": usage}

    def event(self, choice: Choice, piece: Piece, finish: str | None, *, is_first: bool = False) -> bytes:
        said: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            said = {"delta": {"role": "assistant"} if is_first else {}}
            if piece.text or is_first:
                said["delta"]["content"] = piece.text
        row = {"index": choice.index, **said, "logprobs": self.logprobs(piece.tokens), "finish_reason": finish}
        return self.sent({**self._chunk(), "choices": [row]})

    def usage_event(self, usage: dict[str, int]) -> bytes:
        return self.sent({**self._chunk(), "choices": [], "usage": usage})

    def _chunk(self) -> dict[str, Any]:
        return self.head("chat.completion.chunk" if self.is_chat else "text_completion")

    @staticmethod
    def sent(event: dict[str, Any]) -> bytes:
        # In ASCII: readers of lines may take U+2028 and its like for the end of one.
        return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()

    def logprobs(self, tokens: list[tuple[int, Token]]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        if self.is_chat:
            return {"content": [self._entry(token) for _, token in tokens], "refusal": None}
        rows = [(offset, token, text_of(self.tokenizer, token.id)) for offset, token in tokens]
        return {
            "tokens": [text for _, _, text in rows],
            "token_logprobs": [token.logprob for _, token, _ in rows],
            "top_logprobs": [self._top(token) for _, token, _ in rows],
            "text_offset": [offset for offset, _, _ in rows],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        return {
            text_of(self.tokenizer, id): value for id, value in (token.likeliest | {token.id: token.logprob}).items()
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            data = self.tokenizer.bytes_of(id)
            return {"token": text_of(self.tokenizer, id), "logprob": logprob, "bytes": list(data)}

        top = [entry(id, value) for id, value in token.likeliest.items()]
        return {**entry(token.id, token.logprob), "top_logprobs": top}
