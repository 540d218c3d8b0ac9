"""uvicorn with what it lacks: connections that send nothing are closed, SIGTERM drains, and --follow."""

import asyncio
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm.base.errors import LLMError, reason, tell
from llm.run_folder import checkpoint
from llm.run_folder.loaded_run import open_run
from llm.serving.api import Server

REQUEST_SECONDS = 10.0  # for the head of a request
READ_SECONDS = 60.0  # in which a client must read some of what waits for it
MOST_CONNECTIONS = 512  # below the 1,024 open files that systems commonly allow a process
BACKLOG = 256  # connections that are taken in at once


class Protocol(H11Protocol):
    """Closes connections that do not finish the head of a request in time, or do not read.

    Beyond MOST_CONNECTIONS the oldest that awaits a request makes room, so that idle ones keep nobody out.
    """

    late: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` once the system takes no more
        self.since = self.loop.time()
        if len(self.connections) > MOST_CONNECTIONS:
            others: list[Any] = list(self.connections)
            min((each for each in others if each.is_idle), key=lambda each: each.since).transport.close()
        if not transport.is_closing():
            self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late is not None:
            self.late.cancel()
        self._reads()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reads()
        self.unread = self.loop.call_later(READ_SECONDS, self._abandon, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads()

    def _reads(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def _abandon(self, before: int) -> None:
        """Drop the connection where nothing was read since. To close it would wait for the reader for ever."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self.unread = self.loop.call_later(READ_SECONDS, self._abandon, left)

    def _expect(self) -> None:
        """Start the clock where a head is awaited; stop it where a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.late is not None:
                self.late.cancel()
                self.late = None
        elif self.late is None:
            self.late = self.loop.call_later(REQUEST_SECONDS, self._close)

    @property
    def is_idle(self) -> bool:
        """True where no request is being answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _close(self) -> None:
        self.late = None
        if self.is_idle:
            self.transport.close()


class Uvicorn(uvicorn.Server):
    """SIGTERM or Ctrl-C: new requests get 503, those in progress end, then the server does. A second one kills it."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_seconds: float) -> None:
        super().__init__(config)
        self.server, self.drain_seconds = server, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.server.draining:
            self.force_exit = self.should_exit = True
            return
        self.server.draining = True
        self.until = time.monotonic() + self.drain_seconds
        tell(f"stopping: {self.server.active} requests are in progress", sys.stderr)

    async def on_tick(self, counter: int) -> bool:
        if self.server.draining and (not self._is_answering() or time.monotonic() > self.until):
            self.should_exit = True
        return await super().on_tick(counter)

    def _is_answering(self) -> bool:
        """True where an answer is in progress, or waits for a client that reads it slowly."""
        transports = (connection.transport for connection in list(self.server_state.connections))
        return self.server.active > 0 or any(each.get_write_buffer_size() for each in transports)


def configured(app: Any) -> uvicorn.Config:
    """uvicorn's settings. No access log: it would show what people ask for. At its end `Uvicorn` has waited already."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, log_level="critical", access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=1 << 14, backlog=BACKLOG,
    )  # fmt: skip


async def follow(server: Server, seconds: float = 1.0, retry: float = 30.0) -> None:
    """Serve the newest good checkpoint of the run, as soon as it is there. A damaged one is passed over, by name.

    One that this machine cannot open now, as files or memory have run out, is tried again after `retry` seconds.
    """
    folder, served = server.run.folder, _version(server.run.checkpoint.folder)
    seen: tuple[str | int, ...] = ()
    while True:
        await asyncio.sleep(seconds)
        try:
            there = checkpoint.folders(folder)
            if not there or _version(there[0]) in (seen, served) or not server.engine.can_swap():
                continue
            seen = _version(there[0])
            newest = await asyncio.to_thread(open_run, str(folder.absolute() / "newest"))
        except LLMError as error:
            tell(f"{seen[0] if seen else folder} is not served: {reason(error)}", sys.stderr)
            continue
        except (OSError, RuntimeError, MemoryError) as error:  # may pass, such as memory that ran out
            name = seen[0] if seen else folder
            tell(f"{name} is not served yet, tried again in {retry:g} s: {reason(error)}", sys.stderr)
            seen = ()
            await asyncio.sleep(retry)
            continue
        if (version := _version(newest.checkpoint.folder)) != served:
            served = version
            server.engine.swap(newest)
            tell(f"now serving {newest.name}", sys.stderr)


def _version(folder: Path) -> tuple[str | int, ...]:
    """The checkpoint in a folder, to tell it from one of the same step in a run of the same name."""
    try:
        found = (folder / checkpoint.WEIGHTS).stat()
    except FileNotFoundError:
        return (folder.name,)
    return folder.name, found.st_ino, found.st_mtime_ns
