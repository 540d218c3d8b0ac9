"""Requests as OpenAI's API writes them, checked strictly: a field that would change the answer is heeded or refused."""

import json
from dataclasses import fields
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from llm.base.errors import LLMError, TextError
from llm.data.conversations import Message, checked
from llm.inference.fast_decode import SLOTS
from llm.inference.sampling import Sampling

MOST_TOKENS = 1 << 20
MOST_ALTERNATIVES = 20
MOST_TEXTS = 64  # prompts times n
DEFAULTS = {each.name: each.default for each in fields(Sampling)}
BOUNDS = {each.name: (each.metadata["least"], each.metadata["most"]) for each in fields(Sampling)}

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# Lists end at their first fault: a body of a million faults is refused as fast as one of a single fault.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
Prompts = Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
Chosen = TypeVar("Chosen", bound="Common")


class ApiError(LLMError):
    """An error as OpenAI's API writes it."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.http, self.code, self.param = status, code, param

    def as_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.http < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, code: str | None = None, param: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, code, param)


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(BaseModel):
    type: Literal["text"]


class Common(BaseModel):
    """The fields that completions and chat share. Defaults of sampling are those of `llm.sample`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    n: Annotated[int, Field(ge=1, le=SLOTS)] | None = None
    temperature: Annotated[float, Field(ge=BOUNDS["temperature"][0], le=BOUNDS["temperature"][1])] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=BOUNDS["repetition_penalty"][0], le=BOUNDS["repetition_penalty"][1])] | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    ignore_eos: bool | None = None  # as vLLM and llama.cpp name it: exactly max_tokens tokens, for measurements
    # Accepted where they ask for nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # They change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> Sampling:
        given = {name: getattr(self, name) for name in DEFAULTS if getattr(self, name) is not None}
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], BOUNDS["top_p"][0])
        return Sampling(**given)


class Completion(Common):
    prompt: str | Ids | Texts | Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def agrees(self) -> "Completion":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not done here")
        if len(self.prompts) * (self.n or 1) > MOST_TEXTS:
            raise ValueError(f"prompts times n are more than {MOST_TEXTS}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 without echo asks for nothing")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]


class Chat(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    response_format: TextFormat | None = None
    # Accepted where they ask for nothing.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    truncation: Literal["auto", "disabled"] | None = None  # auto: the oldest exchanges that do not fit are left out

    @model_validator(mode="after")
    def agrees(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[Message]:
        """The messages as a chat template takes them. ApiError where they do not alternate up to a user's."""
        rows = []
        for each in self.messages:
            content = each.content if isinstance(each.content, str) else "".join(part.text for part in each.content)
            rows.append({"role": "system" if each.role == "developer" else each.role, "content": content})
        try:
            messages = checked("messages", {"messages": rows})
        except TextError as error:
            raise bad(str(error), param="messages") from error
        if messages[-1]["role"] != "user":
            raise bad("the last message must be a user's: the answer follows it", param="messages")
        return messages


Asked: TypeAlias = Completion | Chat


def parsed(kind: type[Chosen], body: bytes) -> Chosen:
    """The request in `body`. ApiError, 400, names the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        # Of a field that takes several types, the fault within the right one before those of the others.
        first = next((each for each in found if not each["type"].endswith("_type")), found[0])
        if first["type"] == "json_invalid":
            raise bad(f"the body is not JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}") from None
        names = [str(each) for each in first["loc"] if str(each) in kind.model_fields] or [str(first["loc"][0])] \
            if first["loc"] else [""]  # fmt: skip
        if first["type"] == "extra_forbidden":
            raise bad(f"{json.dumps(names[0])} is not known here", "unknown_parameter", names[0]) from None
        where = f"{names[0]}: " if names[0] else ""
        raise bad(where + first["msg"].removeprefix("Value error, "), "invalid_value", names[0] or None) from None
