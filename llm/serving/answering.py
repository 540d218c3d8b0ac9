"""One request's way through the engine: its body in, its pieces out, whole or as a stream of events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llm.inference.fast_decode import SLOTS
from llm.serving.answers import Choice, Writer
from llm.serving.engine import BusyError, Engine, EngineError, Job
from llm.serving.requests import ApiError, Asked, Chat, bad

MOST_DROPPED, DROP_SECONDS = 16 << 20, 1.0  # read and dropped of a body that is too large: bytes, seconds


@dataclass(frozen=True)
class Limits:
    body: int = 1 << 20  # bytes
    body_seconds: float = 20.0
    tokens: int = 4096  # new ones of an answer
    seconds: float = 600.0  # of an answer; then it ends as if it had reached its length


async def body_of(limits: Limits, request: Request) -> bytes:
    """The body of a request. ApiError, 413 or 408, where it is too large or comes too slowly."""
    body = bytearray()
    too_large = ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {limits.body:,} bytes")
    length = request.headers.get("content-length", "")
    stream = request.stream()
    if length.isdecimal() and int(length[:20]) > limits.body:
        if request.headers.get("expect", "").lower() != "100-continue":  # else it sends nothing before it is asked to
            await _read_on(stream)
        raise too_large
    try:
        async with _within(limits.body_seconds):
            async for chunk in stream:
                body += chunk
                if len(body) > limits.body:
                    await _read_on(stream)
                    raise too_large
    except TimeoutError:
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time") from None
    return bytes(body)


async def _read_on(stream: AsyncIterator[bytes]) -> None:
    """Drop some of what still comes: a client that is sending when the connection is closed never sees the refusal."""
    left = MOST_DROPPED
    with suppress(TimeoutError, ClientDisconnect):
        async with _within(DROP_SECONDS):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    return


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """TimeoutError where the block takes longer (asyncio.timeout, which Python 3.10 lacks)."""
    task, late = asyncio.current_task(), False

    def end() -> None:
        nonlocal late
        late = True
        assert task is not None
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()


async def reply(
    engine: Engine, limits: Limits, request: Request, asked: Asked, jobs: list[Job], echoes: list[str] | None
) -> Response:
    """Run the jobs and answer whole or as a stream. A client that disconnects frees its slots."""
    run, is_chat = jobs[0].checkpoint.run, isinstance(asked, Chat)
    writer = Writer(run.folder.name, run.name, run.tokenizer, is_chat, asked.likeliest is not None)
    choices = [Choice(index, job, asked.stops) for index, job in enumerate(jobs)]
    if len(jobs) > (most := SLOTS + engine.queue):
        raise bad(f"{len(jobs)} texts are more than the {most} that find room here: ask for fewer at once")
    try:
        engine.submit(jobs)
    except BusyError as error:
        full = ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), "rate_limit_exceeded")
        return JSONResponse(full.as_json(), full.http, {"Retry-After": str(engine.retry_after)})

    def release() -> None:
        for job in jobs:
            engine.cancel(job)

    grown = _grown(engine, limits, choices, echoes)
    if asked.stream:
        wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Events(_events(writer, grown, choices, wants_usage), release, limits.seconds + 10)
    work = asyncio.create_task(_drained(grown))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        work.result()
    finally:
        work.cancel()
        gone.cancel()
        release()
    return JSONResponse(writer.whole(choices, _usage(choices)))


async def _grown(
    engine: Engine, limits: Limits, choices: list[Choice], echoes: list[str] | None
) -> AsyncIterator[tuple[Choice, Any]]:
    """Pieces of the choices as they come, the last of each with its `finish` set. ApiError where the model fails."""
    going = {choice.job: choice for choice in choices}
    out: asyncio.Queue[Any] = choices[0].job.out
    timer = asyncio.get_running_loop().call_later(limits.seconds, out.put_nowait, (None, None))
    told: set[int] = set()
    try:
        while going:
            job, item = await out.get()
            if job is None:  # the time is over
                for choice in going.values():
                    engine.cancel(choice.job)
                    yield choice, choice.end("length")
                return
            if job not in going:
                continue
            choice = going[job]
            if isinstance(item, EngineError):
                raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(item))
            if echoes and choice.index not in told:
                told.add(choice.index)
                yield choice, choice.echo(echoes[choice.index])
            piece = choice.feed(item) if item is not None else choice.end(job.finish)
            if item is not None and choice.is_stopped:
                engine.cancel(job)
                choice.finish = "stop"
            if choice.finish:
                del going[job]
            yield choice, piece
    finally:
        timer.cancel()


async def _drained(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    writer: Writer, grown: AsyncIterator[tuple[Choice, Any]], choices: list[Choice], wants_usage: bool
) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    try:
        async for choice, piece in grown:
            if piece.text or piece.tokens or choice.finish:
                is_first = choice.index not in begun
                begun.add(choice.index)
                yield writer.event(choice, piece, choice.finish or None, is_first=is_first)
    except ApiError as error:
        yield writer.sent(error.as_json())
        return
    if wants_usage:
        yield writer.usage_event(_usage(choices))
    yield b"data: [DONE]\n\n"


def _usage(choices: list[Choice]) -> dict[str, int]:
    prompts = sum(len(each.job.prompt) for each in choices if each.job.row == 0)
    said = sum(each.said for each in choices)
    return {"prompt_tokens": prompts, "completion_tokens": said, "total_tokens": prompts + said}


class Events(StreamingResponse):
    """A stream of server-sent events that calls `release` once it ends, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None], seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.release, self.seconds = release, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):  # of a reader that does not read
                async with _within(self.seconds):
                    await super().__call__(scope, receive, send)
        finally:
            self.release()
