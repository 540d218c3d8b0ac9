"""A run that continues text and one that talks, both trained here, and a server in a thread of its own."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.run_folder.loaded_run import LoadedRun, open_run
from llm.serve import listening
from llm.serving.answering import Limits
from llm.serving.api import Server, application
from llm.serving.engine import Engine
from llm.serving.server import Uvicorn, configured
from tests.data.test_conversations import said
from tests.forks import run, train, write_recipe, write_text

CPU, LIMITS = torch.device("cpu"), Limits()


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `tiny` and `talk`."""
    here = tmp_path_factory.mktemp("serving")
    said(here)
    (here / "base").mkdir()
    recipe = write_recipe(
        here / "base",
        write_text(here / "text.txt"),
        **{"model.context": 64, "train.steps": 30, "train.tokens_per_step": 256},
    )
    ended = run(train(recipe), here)
    assert ended.status == 0, ended.err
    keys: dict[str, object] = {
        "run": "talk", "model.from": here / "runs/tiny/best", "model.context": 128, "train.tokens_per_step": 256,
        "evaluate.prompts": "auto", "train.steps": 8, "train.warmup": 0, "text.cache": here / "cache",
        "tokenizer.vocabulary": None, "model.dim": None, "model.layers": None, "model.heads": None}  # fmt: skip
    (here / "chat").mkdir()
    ended = run(train(write_recipe(here / "chat", here / "chat.jsonl", **keys)), here)
    assert ended.status == 0, ended.err
    return here


@pytest.fixture(scope="session")
def tiny_run(here: Path) -> LoadedRun:
    return open_run(str(here / "runs/tiny"), CPU)


@pytest.fixture(scope="session")
def talk_run(here: Path) -> LoadedRun:
    return open_run(str(here / "runs/talk"), CPU)


@dataclass
class Served:
    server: Server
    port: int
    uvicorn: Uvicorn

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def idle(self) -> None:
        """Wait until no text is in a slot or in the queue."""
        until = time.monotonic() + 20
        while self.server.engine.running or self.server.engine.waiting:
            assert time.monotonic() < until
            time.sleep(0.005)


@contextmanager
def served(
    opened: LoadedRun, queue: int = 128, limits: Limits = LIMITS, key: str | None = None,
    origins: tuple[str, ...] = (), also: Callable[[Server], Any] | None = None,
) -> Iterator[Served]:  # fmt: skip
    """The server on a free port, in a thread."""
    listener = listening("127.0.0.1", 0)
    server = Server(Engine(opened, queue), limits, key, list(origins))
    app = application(server, None if also is None else lambda: also(server))
    uvicorn = Uvicorn(configured(app), server, 5)
    thread = threading.Thread(target=uvicorn.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not uvicorn.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Served(server, listener.getsockname()[1], uvicorn)
    finally:
        uvicorn.should_exit = uvicorn.force_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="package")  # no longer: other tests fork, and a server's threads do not survive that
def tiny_server(tiny_run: LoadedRun) -> Iterator[Served]:
    with served(tiny_run) as found:
        yield found


@pytest.fixture(scope="package")
def talk_server(talk_run: LoadedRun) -> Iterator[Served]:
    with served(talk_run) as found:
        yield found
