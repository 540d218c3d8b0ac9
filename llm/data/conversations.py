"""Conversations: their rows, checked strictly, and the canonical JSON that is a conversation's document.

As a document like any other, a conversation is surveyed, split, cached and fingerprinted as text is; only the encoder
knows that it is to be rendered by a chat template (chat_template.py).
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from llm.base.errors import TextError

Message: TypeAlias = dict[str, str]  # role and content
ROLES = ("system", "user", "assistant")
# By form of a row: the key of its list, those of a message's role and content, and the names of roles.
FORMS = {
    "messages": ("role", "content", {role: role for role in ROLES}),
    "conversations": ("from", "value", {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}),
}
MAX_CONVERSATION = 1 << 20  # bytes of JSON, which are held in memory


def is_row(row: Any, field: str) -> bool:
    """True if a .jsonl row is meant as a conversation: it has no text in `field`, but a list of messages."""
    return isinstance(row, dict) and not isinstance(row.get(field), str) and not FORMS.keys().isdisjoint(row)


def documents_of(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[bytes]]:
    """The document of each (place, row). TextError, in one line, names the place of a row that is no conversation."""
    for place, row in rows:
        yield (as_document(checked(place, row), place),)


def checked(place: str, row: Any) -> list[Message]:
    """The messages of a row: user and assistant in turn after an optional system message, none of them empty."""
    form = next((name for name in FORMS if isinstance(row, dict) and name in row), None)
    if form is None:
        raise TextError(f"{place} is no conversation, as other rows are: give it messages, or move it to another file")
    role_key, content_key, names = FORMS[form]
    rows, messages = row[form], []
    if not isinstance(rows, list) or not rows:
        mend = f'write [{{"{role_key}": ..., "{content_key}": ...}}, ...]'
        raise TextError(f"{place} has no list of messages in {form!r}: {mend}")
    for number, each in enumerate(rows, 1):
        where = f"{place}, message {number},"
        if not isinstance(each, dict):
            raise TextError(
                f"{where} is {type(each).__name__}: an object with {role_key} and {content_key} is expected"
            )
        role, content = each.get(role_key), each.get(content_key)
        if not isinstance(role, str) or role not in names:
            shown = json.dumps(role)[:40]
            raise TextError(f"{where} has {role_key} = {shown}: one of {', '.join(names)} is expected")
        if content is None:
            raise TextError(f"{where} has no {content_key}: give it one, or leave the conversation out")
        if not isinstance(content, str):
            raise TextError(f"{where} has {content_key} of type {type(content).__name__}: write it as one string")
        if not content.strip():
            raise TextError(f"{where} is empty: give it {content_key}, or leave the conversation out")
        if "\0" in content:
            raise TextError(f"{where} holds a NUL character: it is not plain text, or must be cleaned")
        messages.append({"role": names[role], "content": content})
    _check_order(place, messages)
    return messages


def _check_order(place: str, messages: list[Message]) -> None:
    first = int(messages[0]["role"] == "system")
    if first == len(messages):
        raise TextError(f"{place} is only a system message: let a user's message follow it")
    for number, message in enumerate(messages[first:]):
        expected = ROLES[1 + number % 2]
        if message["role"] != expected:
            rule = "user and assistant in turn, after at most one system message, beginning with user"
            raise TextError(
                f"{place}, message {first + number + 1}, is of {message['role']}, where {expected} is expected: {rule}"
            )


def as_document(messages: list[Message], place: str = "the conversation") -> bytes:
    """Canonical JSON. TextError where it is too large, or cannot be written as UTF-8."""
    try:
        document = json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{place} holds half of a surrogate pair: it cannot be written as UTF-8") from error
    if len(document) > MAX_CONVERSATION:
        size = f"{len(document) / 1e6:,.1f} MB, more than {MAX_CONVERSATION >> 20} MiB"
        raise TextError(f"{place} is a conversation of {size}: shorten it, or split it into several")
    return document


def messages_of(document: bytes) -> list[Message]:
    messages: list[Message] = json.loads(document)
    return messages


def text_of(document: bytes) -> bytes:
    """The messages of a conversation as text, to train a vocabulary on."""
    return "\n".join(message["content"] for message in messages_of(document)).encode()


def from_turns(turns: Iterable[tuple[str, str]]) -> list[Message]:
    """A conversation of two from (sender, text) in order: what one says in a row is one turn; blank texts are none.

    The first sender is the user. Of one turn there is no conversation: an empty list.
    """
    messages: list[Message] = []
    last = None
    for sender, text in turns:
        if not text.strip():
            continue
        if sender == last:
            messages[-1]["content"] += f"\n{text}"
        else:
            messages.append({"role": ROLES[1 + len(messages) % 2], "content": text})
        last = sender
    return messages if len(messages) > 1 else []
