"""OpenAI's API over the engine, as a starlette application; beside it /health, /metrics, /run and the page."""

import asyncio
import hmac
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.base.errors import LLMError, RecipeError, reason, tell
from llm.data.chat_template import template_of
from llm.inference.chat import Conversation
from llm.run_folder.loaded_run import LoadedRun
from llm.serving import page
from llm.serving.answering import Limits, body_of, reply
from llm.serving.engine import Checkpoint, Engine, Job
from llm.serving.requests import ApiError, Asked, Chat, Completion, bad, parsed

LOCAL = ("127.0.0.1", "localhost", "[::1]")
PORT = re.compile(r":\d+$")
OPEN = ("/", "/health")  # need no key; the page holds nothing of the run
MOST_HEAD = 1 << 14  # bytes of the path and headers


@dataclass
class Server:
    """The state of the application."""

    engine: Engine
    limits: Limits
    key: str | None = None
    origins: list[str] = field(default_factory=list)
    draining: bool = False
    broken: bool = False  # the engine or --follow has failed
    active: int = 0  # requests in progress

    @property
    def run(self) -> LoadedRun:
        return self.engine.newest.run


def application(server: Server, also: Callable[[], Any] | None = None) -> ASGIApp:
    """The application; `also` makes a coroutine that runs beside the engine."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (server.engine.run(), *([also()] if also else []))]
        for task in tasks:
            task.add_done_callback(partial(_ended, server))
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def route(path: str, act: Callable[..., Any], method: str = "GET") -> Route:
        return Route(path, partial(act, server), methods=[method])

    routes = [
        route("/v1/models", models),
        route("/v1/models/{name:path}", model),
        route("/v1/completions", completions, "POST"),
        route("/v1/chat/completions", chat, "POST"),
        route("/health", health),
        route("/metrics", metrics),
        route("/run", run),
        route("/", home),
    ]
    handlers: Any = {ApiError: _told, HTTPException: _told, ClientDisconnect: _told, Exception: _told}
    allowed = [Middleware(CORSMiddleware, allow_origins=server.origins, allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,
        lifespan=lifespan,
        middleware=[*(allowed if server.origins else []), Middleware(Gate, server=server)],
    )
    app.router.redirect_slashes = False
    return app


def _ended(server: Server, task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        server.broken = True
        tell(f"the server is broken: {reason(error)}", sys.stderr)
        signal.raise_signal(signal.SIGTERM)


class Gate:
    """Middleware: refuses requests by size, host, origin and key, and with 503 while the server shuts down."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        server, request = self.server, Request(scope)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                server.engine.counts[f"status_{message['status']}"] += 1
            await send(message)

        server.active += 1
        try:
            if (error := self._refusal(request)) is not None:
                await _error(error)(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        finally:
            server.active -= 1

    def _refusal(self, request: Request) -> ApiError | None:
        # Not request.url: an older starlette takes that from the Host header, and x/health? as a host needs no key.
        server, path, headers = self.server, request.scope["path"], request.headers
        size = len(request.scope["raw_path"]) + len(request.scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEAD:
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return ApiError(too_large, f"path and headers are larger than {MOST_HEAD:,} bytes")
        host = headers.get("host", "").lower()
        if server.key is None and PORT.sub("", host) not in LOCAL:
            return ApiError(HTTPStatus.FORBIDDEN, "only for this machine")  # a page elsewhere that says it is ours
        origin = headers.get("origin")
        known = (None, f"http://{host}", f"https://{host}", *server.origins)
        if origin not in known and "*" not in server.origins:
            return ApiError(HTTPStatus.FORBIDDEN, "pages of other origins may not ask: see --cors")
        if server.key is not None and path not in OPEN:
            given = re.sub("(?i)^bearer +", "", headers.get("authorization", ""))
            if not hmac.compare_digest(given.encode(), server.key.encode()):
                return ApiError(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong", "invalid_api_key")
        if server.draining and path not in ("/metrics", "/run"):
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping: ask again soon")
        return None


def _error(error: ApiError) -> JSONResponse:
    headers = {}
    if error.http == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "5"
    if error.http in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers["Connection"] = "close"  # the rest of the body is not read
    if error.http == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.as_json(), error.http, headers)


async def _told(request: Request, error: Exception) -> Response:
    """Any exception as OpenAI's API tells it."""
    if isinstance(error, ApiError):
        return _error(error)
    if isinstance(error, HTTPException):
        said = f"{request.method} {request.scope['path']}: {error.detail}"
        told = _error(ApiError(HTTPStatus(error.status_code), said))
        told.headers.update(error.headers or {})  # such as Allow
        return told
    if isinstance(error, ClientDisconnect):
        return Response(status_code=HTTPStatus.BAD_REQUEST)
    tell(f"a request failed: {reason(error)}", sys.stderr)
    return _error(ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, reason(error)))


async def models(server: Server, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(server)]})


async def model(server: Server, request: Request) -> Response:
    _check_model(server, request.path_params["name"])
    return JSONResponse(_model(server))


def _model(server: Server) -> dict[str, Any]:
    run, created = server.run, 0
    with suppress(OSError):  # training may have removed it
        created = int(run.checkpoint.folder.stat().st_mtime)
    about = {"id": run.folder.name, "object": "model", "created": created, "owned_by": "local"}
    return about | {"checkpoint": run.name, "context": run.model.shape.context, "chat": run.is_chat}


def _check_model(server: Server, name: str | None) -> None:
    run = server.run
    if name not in (None, run.folder.name, run.name):
        message = f"there is no model {name!r} here: it is {run.folder.name!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, "model_not_found", "model")


async def completions(server: Server, request: Request) -> Response:
    asked = parsed(Completion, await body_of(server.limits, request))
    _check_model(server, asked.model)
    checkpoint = server.engine.newest
    tokenizer = checkpoint.run.tokenizer
    tokens = min(server.limits.tokens, 200 if asked.max_tokens is None else asked.max_tokens)
    texts, prompts = [], []
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            ids = [tokenizer.bos, *await asyncio.to_thread(tokenizer.encode, prompt)]
        elif max(prompt) >= tokenizer.vocab_size:
            raise bad(f"prompt: a token of {max(prompt)} is none of the {tokenizer.vocab_size}", param="prompt")
        else:
            ids = prompt
        texts.append(prompt if isinstance(prompt, str) else tokenizer.decode(ids))
        prompts.append(ids)
    jobs = _jobs(checkpoint, asked, prompts, tokens, tokenizer.ends, tokenizer.banned)
    for job in jobs:
        job.echo = bool(asked.echo)
    echoes = [text for text in texts for _ in range(asked.n or 1)] if asked.echo else None
    return await reply(server.engine, server.limits, request, asked, jobs, echoes)


async def chat(server: Server, request: Request) -> Response:
    asked = parsed(Chat, await body_of(server.limits, request))
    _check_model(server, asked.model)
    checkpoint = server.engine.newest
    run = checkpoint.run
    if not run.is_chat:
        raise bad(
            f"{run.folder.name} was not trained on conversations: ask /v1/completions", "no_chat_template", "model"
        )
    template, messages = template_of(run.tokenizer), asked.conversation()
    wanted = asked.max_completion_tokens or asked.max_tokens or server.limits.tokens
    try:
        if asked.truncation == "auto":
            conversation = Conversation(run, messages[:-1])
            ids = await asyncio.to_thread(conversation.prompt, messages[-1]["content"], wanted)
        else:
            ids = await asyncio.to_thread(template.prompt, messages)
    except RecipeError as error:
        raise bad(str(error), "context_length_exceeded", "messages") from error
    except LLMError as error:
        raise bad(str(error), param="messages") from error
    tokens = min(server.limits.tokens, wanted, max(1, run.model.shape.context - len(ids) + 1))
    jobs = _jobs(checkpoint, asked, [ids], tokens, template.ends, template.banned)
    return await reply(server.engine, server.limits, request, asked, jobs, None)


def _jobs(
    checkpoint: Checkpoint,
    asked: Asked,
    prompts: list[list[int]],
    tokens: int,
    ends: tuple[int, ...],
    banned: tuple[int, ...],
) -> list[Job]:
    """A job for each text, `n` of each prompt in a row. ApiError where a prompt is longer than the context."""
    context = checkpoint.run.model.shape.context
    if (longest := max(map(len, prompts))) > context:
        message = f"the prompt has {longest:,} tokens, more than the context of {context:,}: shorten it"
        raise bad(message, "context_length_exceeded", "messages" if isinstance(asked, Chat) else "prompt")
    if asked.ignore_eos:
        ends, banned = (), (*banned, *ends)
    seed = torch.seed() if asked.seed is None else asked.seed
    out: asyncio.Queue[Any] = asyncio.Queue()
    return [
        Job(checkpoint, ids, tokens, asked.sampling, seed % (1 << 63), out, row, ends, banned, asked.likeliest)
        for ids in prompts
        for row in range(asked.n or 1)
    ]


async def health(server: Server, request: Request) -> Response:
    engine = server.engine
    return JSONResponse({"status": "ok", "checkpoint": server.run.name, "running": engine.running,
                         "waiting": len(engine.waiting)})  # fmt: skip


async def metrics(server: Server, request: Request) -> Response:
    return PlainTextResponse(page.prometheus(server.engine), media_type="text/plain; version=0.0.4")


async def run(server: Server, request: Request) -> Response:
    """The run for the page: its name, settings with their bounds, and its curve while it trains."""
    about = await asyncio.to_thread(page.about, server.run)
    return JSONResponse(about, headers={"Cache-Control": "no-store"})


async def home(server: Server, request: Request) -> Response:
    text, policy = page.home()
    headers = {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }  # fmt: skip
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)
