"""Chat templates: from messages to ids, with the part that each id plays, and to the prompt of an answer.

Vocabularies of our own have an id for each turn marker, and no text is ever encoded to one: what is said in a message
cannot end it. A borrowed tokenizer has a template in jinja, rendered exactly as transformers does, in jinja2's sandbox.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from llm.base.atomic_io import digest_of
from llm.base.errors import RecipeError, RefusedError
from llm.data.conversations import ROLES, Message
from llm.data.hf_tokenizer import HFTokenizer
from llm.data.tokenizer import CONTROLS, Tokenizer

CONTEXT, ANSWER, TURN = 0, 1, 2  # parts of ids: only read; to be learnt; the first of a user's turn, only read
END = CONTROLS[-1]
GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
STAND_IN = re.compile("\ue000\\d+\ue001")
# `OwnTemplate` in jinja. transformers takes the ids within `generation` as targets.
JINJA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN_JINJA = GENERATION.sub("", JINJA)  # for programs that do not know the tag
# The same for Ollama, which puts BOS first itself.
GO = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"

Encoded = tuple[np.ndarray, np.ndarray]  # ids of int32, and their parts of uint8


class ChatTemplate(Protocol):
    ends: tuple[int, ...]  # ids that end an answer
    banned: tuple[int, ...]  # ids that no answer holds
    fingerprint: str  # differs whenever the ids could
    tagged: bool  # the template itself says what the answers are, which transformers heeds

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]: ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's answer follows."""


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """RecipeError if this tokenizer has no way to write a conversation."""
    if isinstance(tokenizer, HFTokenizer):
        return JinjaTemplate(tokenizer)
    return OwnTemplate(tokenizer)


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """The ids after which a text that begins with `prompt` goes on or, with `chat`, its answer follows."""
    if chat:
        return template_of(tokenizer).prompt([{"role": "user", "content": prompt}])
    return [tokenizer.bos, *tokenizer.encode(prompt)]


def spoken(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of conversations for people: turn markers and other pieces without text by their names."""
    return b"".join(tokenizer.bytes_of(id) or tokenizer.piece(id).encode() for id in ids).decode(errors="replace")


class OwnTemplate:
    """BOS; each message: the marker of its role, its text, the end of the turn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = [tokenizer.id_of(name) for name in CONTROLS]
        if not all(id in tokenizer.controls for id in ids):
            raise RecipeError(
                f"this vocabulary has no turn markers ({', '.join(CONTROLS)}), without which it cannot hold a "
                "conversation: train a new one, which reserves them"
            )
        self._tokenizer = tokenizer
        *markers, self.end = [id for id in ids if id is not None]
        self._markers = dict(zip(ROLES, markers, strict=True))
        self.fingerprint, self.tagged = "own 1", True
        self.ends = tuple(sorted({*tokenizer.ends, self.end}))
        self.banned = tuple(id for id in tokenizer.banned if id != self.end)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        texts = [message["content"] for messages in conversations for message in messages]
        contents = iter(self._tokenizer.encode_batch(texts, threads=1))
        return [self._joined(messages, contents) for messages in conversations]

    def _joined(self, messages: Sequence[Message], contents: Iterator[np.ndarray]) -> Encoded:
        ids: list[Any] = [[self._tokenizer.bos]]
        parts: list[Any] = [[CONTEXT]]
        for message in messages:
            role, content = message["role"], next(contents)
            learnt = ANSWER if role == "assistant" else CONTEXT
            ids += [[self._markers[role]], content, [self.end]]
            parts += [[TURN if role == "user" else CONTEXT], np.full(len(content), learnt), [learnt]]
        return np.concatenate(ids).astype(np.int32), np.concatenate(parts).astype(np.uint8)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        ((ids, _),) = self.encode([messages])
        return [*ids.tolist(), self._markers["assistant"]]


class JinjaTemplate:
    """The template of a borrowed tokenizer's folder."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        source = tokenizer.chat_template
        if source is None:
            raise RecipeError(
                "this tokenizer has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
                "without which it cannot hold a conversation: add one, or start from another model"
            )
        self._tokenizer, self.tagged = tokenizer, GENERATION.search(source) is not None
        self._template, self._named = _compiled(source), tokenizer.special_names
        self._header, end = self._bounds()
        self.ends, self.banned = tuple(sorted({*tokenizer.ends, *end})), tokenizer.banned
        # The number counts changes to what is learnt where the template does not say it.
        self.fingerprint = digest_of([source, self._named, *([] if self.tagged else [2])])

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        return [self._encode(list(messages)) for messages in conversations]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode(self.render(messages, answer=True)[0])

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the tag `generation` stands; with the prompt of an `answer`."""
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        from jinja2 import TemplateError

        try:
            with self._template.environment.tracked(blocks, spans):
                given = {"tools": None, "documents": None, "add_generation_prompt": answer, **self._named}
                for block in self._template.generate(messages=[dict(each) for each in messages], **given):
                    blocks.append(block)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            begin = messages[0]["content"][:40] if messages else ""
            raise RefusedError(
                f"the chat template fails on the conversation that begins with {begin!r}: {str(error)[:200]}"
            ) from error
        return "".join(blocks), spans

    def _encode(self, messages: list[Message]) -> Encoded:
        text, spans = self.render(messages)
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        glue = self._glue(messages, text)
        parts = np.full(len(ids), CONTEXT, np.uint8)
        if self.tagged:
            parts[_overlapping(offsets, spans)] = ANSWER
        elif glue is None:
            raise RefusedError(
                "the chat template alters what is said and does not mark answers: put the assistant's content and its "
                "end between {% generation %} and {% endgeneration %}"
            )
        else:
            parts[_overlapping(offsets, self._answers(messages, text, glue, ids, offsets))] = ANSWER
        for begin in self._turns(messages, text, glue, offsets[parts == ANSWER]):
            at = int(np.searchsorted(offsets[:, 0], begin))
            if at < len(ids) and offsets[at, 0] == begin and parts[at] == CONTEXT:
                parts[at] = TURN
        return ids, parts

    def _bounds(self) -> tuple[str, list[int]]:
        """The text between a message and its answer, and the id of the special token that ends an answer, if any."""
        user, answer = ({"role": role, "content": f"\ue000{at}\ue001"} for at, role in enumerate(ROLES[1:]))
        try:
            asked, said = self.render([user], answer=True)[0], self.render([user, answer])[0]
        except RefusedError:  # which is raised again on the first conversation
            return "", []
        _, found, header = asked.rpartition(user["content"])
        after = self._tokenizer.encode(said.partition(answer["content"])[2])
        return header if found else "", [id for id in after if not self._tokenizer.bytes_of(id)][:1]

    def _answers(
        self,
        messages: list[Message],
        text: str,
        contents: list[tuple[int, int]],
        ids: np.ndarray,
        offsets: np.ndarray,
    ) -> list[tuple[int, int]]:
        """Where in `text` each answer stands: all that is to follow the prompt, up to the end of the turn."""
        found, before = [], 0
        bounds = [*(begin for begin, _ in contents[1:]), len(text)]
        for (begin, end), after, message in zip(contents, bounds, messages, strict=True):
            if message["role"] == "assistant":
                if text.startswith(self._header, before) and before + len(self._header) <= begin:
                    begin = before + len(self._header)
                first, last = np.searchsorted(offsets[:, 0], [end, after]).tolist()
                ending = next((at for at in range(first, last) if ids[at] in self.ends), None)
                found.append((begin, end if ending is None else int(offsets[ending, 1])))
            before = end
        return found

    def _glue(self, messages: list[Message], text: str) -> list[tuple[int, int]] | None:
        """Where in `text` each message's content stands; None if the template alters content.

        Found by rendering stand-ins, which no template knows. A template may leave out space around what is said.
        """
        names = [f"\ue000{number}\ue001" for number in range(len(messages))]
        stood, _ = self.render([{**each, "content": name} for each, name in zip(messages, names, strict=True)])
        if STAND_IN.findall(stood) != names:
            return None
        head, *glue = STAND_IN.split(stood)
        found, at = [], len(head)
        for message, after in zip(messages, glue, strict=True):
            said = message["content"]
            shorter = (said, said.strip(), said.lstrip("\n"), said.lstrip(), said.rstrip(), said.strip("\n"))
            size = next((len(each) for each in shorter if text.startswith(each + after, at)), None)
            if size is None:
                return None
            found.append((at, at + size))
            at += size + len(after)
        return found if text.startswith(head) and at == len(text) else None

    def _turns(
        self, messages: list[Message], text: str, contents: list[tuple[int, int]] | None, answers: np.ndarray
    ) -> list[int]:
        """Where in `text` each user's turn begins, its header included; none if that cannot be told.

        What stands before the content of every user's message in the same words is its header. An end of the turn
        before may be taken for a part of it, in each of them, but never an id that is learnt.
        """
        begins = [begin for (begin, _), each in zip(contents or [], messages, strict=False) if each["role"] == "user"]
        if len(begins) < 2:
            return []
        learnt = np.sort(np.append(answers[:, 1], 0))  # ends of ids, in characters
        least = min(begin - learnt[np.searchsorted(learnt, begin, side="right") - 1] for begin in begins)
        header = 0
        while header < least and len({text[begin - header - 1] for begin in begins}) == 1:
            header += 1
        return [begin - header for begin in begins]


def _overlapping(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Indices of the ids whose characters meet one of the spans, as transformers finds them."""
    found, span = [], 0
    for index, (begin, end) in enumerate(offsets.tolist()):
        while span < len(spans) and begin >= spans[span][1]:
            span += 1
        if span == len(spans):
            break
        if end > spans[span][0]:
            found.append(index)
    return np.array(found, np.int64)


def _compiled(source: str) -> Any:
    """The template in transformers' settings of jinja2. RefusedError for a faulty one."""
    import json
    from datetime import datetime

    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: what it holds is written as it is, and its place noted."""

        tags = {"generation"}  # noqa: RUF012

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            self._places: tuple[list[str], list[tuple[int, int]]] | None = None
            environment.extend(tracked=self.tracked)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

        def _noted(self, caller: Any) -> str:
            text: str = caller()
            if self._places is not None:
                blocks, spans = self._places
                begin = len("".join(blocks))
                spans.append((begin, begin + len(text)))
            return text

        @contextmanager
        def tracked(self, blocks: list[str], spans: list[tuple[int, int]]) -> Iterator[None]:
            self._places = blocks, spans
            try:
                yield
            finally:
                self._places = None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions: list[Any] = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise RefusedError(f"the chat template is damaged: {str(error)[:200]}") from error
