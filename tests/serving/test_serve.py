"""The command: who may reach it, how it ends, and a run that is served while it trains."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm.serving.server
import llm.training.trainer
from llm.base.errors import RecipeError
from llm.inference.generation import continuations
from llm.inference.sampling import Sampling
from llm.run_folder import checkpoint
from llm.run_folder.loaded_run import open_run
from llm.serve import key_of, listening
from llm.serving.engine import Engine
from llm.serving.server import follow
from tests.forks import ended, run, script, start, train, write_recipe
from tests.serving.conftest import CPU, served


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "set ONETEXT_API_KEY, or name a --key-file"),
        (["--key-file", "nowhere"], "--key-file = nowhere cannot be read"),
        (["--host", "203.0.113.7", "--key-file", "key.txt"], "cannot be served"),
        (["--queue", "0"], "--queue = 0: must be at least 1"),
        (["--port", "99999"], "--port"),
        (["--host", "a" * 70, "--key-file", "key.txt"], "cannot be served"),
        (["elsewhere"], "there is no run 'elsewhere'"),
    ],
)
def test_a_command_that_cannot_be_served_says_why(here: Path, arguments: list[str], told: str) -> None:
    (here / "key.txt").write_text("s3cret-key\n")
    refused = run(script("module:llm.serve", "tiny", *arguments) if "elsewhere" not in arguments
                  else script("module:llm.serve", *arguments, "--port", 0), here)  # fmt: skip
    assert refused.status == 2 and told in refused.err and len(refused.err.splitlines()) == 1, refused.err
    assert "s3cret" not in refused.err


def test_a_server_whose_engine_ends_says_so_and_exits_with_1(here: Path) -> None:
    def act() -> None:
        async def broken(engine: Engine) -> None:
            raise KeyError("a fault of the engine")

        Engine.run = broken  # type: ignore[method-assign]
        script("module:llm.serve", "tiny", "--port", 0)()

    ended = run(act, here)
    assert ended.status == 1 and "the server is broken: KeyError: 'a fault of the engine'" in ended.err, ended


def test_a_second_server_of_a_port_says_so(here: Path) -> None:
    with closing(listening("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run(script("module:llm.serve", "tiny", "--port", port), here)
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert f"127.0.0.1:{port} cannot be served (Address already in use): name another --host or --port" in refused.err


@pytest.mark.parametrize(
    ("held", "key"),
    [("s3cret-key\n", "s3cret-key"), ("  s3cret-key\r\n\n", "s3cret-key"), ("two words", "two words"), ("\n", None),
     (" ", None), ("two\nlines", None), ("clé", None), ("a\0b", None)],
)  # fmt: skip
def test_a_key_has_no_line_ends_wherever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, key: str | None
) -> None:
    (tmp_path / "key.txt").write_text(held, encoding="utf-8", newline="")
    if "\0" not in held:
        monkeypatch.setenv("ONETEXT_API_KEY", held)
    for path in (tmp_path / "key.txt", *([] if "\0" in held else [None])):
        if key is not None:
            assert key_of(path) == key
        else:
            with pytest.raises(RecipeError, match="must hold a key of printable ASCII") as refused:
                key_of(path)
            assert held.strip() == "" or held not in str(refused.value)


def port_of(folder: Path, tag: str) -> int:
    until = time.monotonic() + 60
    while "serves" not in (
        text := (folder / f"out{tag}.txt").read_text() if (folder / f"out{tag}.txt").exists() else ""
    ):
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(text.split("/")[2].rpartition(":")[2])


def test_sigterm_ends_it_after_the_answers_in_progress(here: Path, tmp_path: Path) -> None:
    key = "a-planted-key"
    run_name = str(here / "runs/tiny")
    child = start(script("module:llm.serve", run_name, "--port", 0), tmp_path, {"ONETEXT_API_KEY": key})
    url, headers = f"http://127.0.0.1:{port_of(tmp_path, '')}", {"Authorization": f"Bearer {key}"}
    body = {"prompt": "The", "max_tokens": 1500, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        os.kill(child, signal.SIGTERM)
        until, statuses = time.monotonic() + 10, [200]
        while statuses[-1] == 200 and time.monotonic() < until:
            statuses.append(httpx.get(f"{url}/health", timeout=30).status_code)
        refused = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
        assert statuses[-1] == refused.status_code == 503 and refused.headers["retry-after"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    found = ended(child, tmp_path)
    assert found.status == 0 and "stopping: " in found.err
    assert key not in found.out + found.err
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.slow  # the answer has to be longer than all that the kernel buffers
def test_sigterm_waits_for_a_client_that_reads_its_answer_slowly(here: Path, tmp_path: Path) -> None:
    child = start(script("module:llm.serve", str(here / "runs/tiny"), "--port", 0), tmp_path)
    body = {"prompt": ["The river"] * 64, "max_tokens": 200, "logprobs": 20, "ignore_eos": True}
    with httpx.stream(
        "POST", f"http://127.0.0.1:{port_of(tmp_path, '')}/v1/completions", json=body, timeout=60
    ) as answer:
        os.kill(child, signal.SIGTERM)
        got = 0
        for part in answer.iter_raw(1 << 16):
            got += len(part)
            time.sleep(0.03)
        assert got == int(answer.headers["content-length"]) > 4 << 20
    assert ended(child, tmp_path, seconds=20).status == 0


def test_a_second_sigterm_ends_it_at_once(here: Path, tmp_path: Path) -> None:
    child = start(script("module:llm.serve", str(here / "runs/tiny"), "--port", 0, "--tokens", 1 << 20), tmp_path)
    url = f"http://127.0.0.1:{port_of(tmp_path, '')}"
    body = {"prompt": "The", "max_tokens": 1 << 20, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        os.kill(child, signal.SIGTERM)
        until = time.monotonic() + 10
        while "stopping: 1 " not in (tmp_path / "err.txt").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(child, signal.SIGTERM)
        with suppress(httpx.RemoteProtocolError):
            assert [line for line in lines if line][-1] != "data: [DONE]"
        found = ended(child, tmp_path, seconds=20)
    assert found.status == 0 and "Traceback" not in found.err, found.err


def slowed(act: Callable[[], None], seconds: float) -> Callable[[], None]:
    """A training that takes `seconds` more for each step."""

    def do() -> None:
        update = llm.training.trainer.Trainer.update

        def late(self: Any, step: int) -> Any:
            time.sleep(seconds)
            return update(self, step)

        llm.training.trainer.Trainer.update = late  # type: ignore[method-assign]
        act()

    return do


def follow_a_training(here: Path, folder: Path, swaps: int) -> None:
    """Requests all the while, whole and streamed: none fails, and each is what its checkpoint says alone."""
    recipe = write_recipe(folder, here / "text.txt", **{
        "text.cache": here / "cache", "model.context": 64, "train.tokens_per_step": 256, "train.steps": 3 * (swaps + 4),
        "checkpoint.every": 3})  # fmt: skip
    child = start(slowed(train(recipe), 0.15), folder)
    root = folder / "runs/tiny"
    until = time.monotonic() + 60
    while not checkpoint.folders(root):
        assert time.monotonic() < until
        time.sleep(0.02)
    answers: list[tuple[str, str]] = []
    faults: list[str] = []
    stop = threading.Event()

    def ask(url: str, number: int) -> None:
        prompt = f"The {number}"
        body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "stream": number % 2 == 0, "n": 1 + number % 3}
        while not stop.is_set():
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            if answer.status_code != 200:
                faults.append(answer.text)
                return
            if number % 2:
                names = {answer.json()["system_fingerprint"]}
                texts = [each["text"] for each in answer.json()["choices"]]
            else:
                lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
                if lines.pop() != "[DONE]":
                    faults.append(answer.text)
                events = [json.loads(line) for line in lines]
                names = {event["system_fingerprint"] for event in events}
                texts = ["".join(event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == index)
                         for index in range(1 + number % 3)]  # fmt: skip
            if len(names) != 1:
                faults.append(f"an answer of several checkpoints: {names}")
            answers.extend((f"{name} {prompt}", text) for name in names for text in texts)

    with served(open_run(str(root / "newest"), CPU), also=lambda server: follow(server, 0.05)) as server:
        threads = [threading.Thread(target=ask, args=(server.url, number)) for number in range(5)]
        for thread in threads:
            thread.start()
        assert ended(child, folder, seconds=300).status == 0
        last = f"tiny/{checkpoint.folders(root)[0].name}"
        until = time.monotonic() + 30
        while server.server.run.name != last and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
        assert server.server.engine.counts["swaps"] >= swaps and server.server.run.name == last
        server.idle()
        assert len(server.server.engine.checkpoints) <= 2
    assert not faults and len(answers) > 20
    said = {}
    for asked, text in answers:
        assert said.setdefault(asked, text) == text
    assert len({asked.split()[0] for asked in said}) >= swaps // 2
    for asked, text in said.items():
        name, _, prompt = asked.partition(" ")
        opened = open_run(str(root / name.partition("/")[2]), CPU)
        ids = [[opened.tokenizer.bos, *opened.tokenizer.encode(prompt)]]
        assert continuations(opened.model, opened.tokenizer, ids, 60, Sampling(temperature=0)) == [text]


def test_a_run_is_followed_while_it_trains(here: Path, tmp_path: Path) -> None:
    follow_a_training(here, tmp_path, 5)


@pytest.mark.slow
def test_20_swaps_under_load_fail_no_request(here: Path, tmp_path: Path) -> None:
    follow_a_training(here, tmp_path, 20)


def test_a_run_whose_folder_vanishes_is_served_on(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "runs/tiny", tmp_path / "tiny", symlinks=True)
    root, ask = tmp_path / "tiny", {"prompt": "The river", "max_tokens": 5, "temperature": 0}
    older = checkpoint.folders(root)[-1]
    with served(open_run(str(root / older.name), CPU), also=lambda server: follow(server, 0.05)) as server:
        root.rename(tmp_path / "away")
        time.sleep(0.3)
        before = server.server.run.name
        for path, status in (("/health", 200), ("/v1/models", 200), ("/metrics", 200), ("/run", 200)):
            assert httpx.get(f"{server.url}{path}").status_code == status, path
        answer = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=30).json()
        assert answer["system_fingerprint"] == before and answer["choices"][0]["text"]
        (tmp_path / "away").rename(root)
        newest = f"tiny/{checkpoint.folders(root)[0].name}"
        until = time.monotonic() + 20
        while server.server.run.name != newest:
            assert time.monotonic() < until
            time.sleep(0.02)
        answer = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=30).json()
        assert answer["system_fingerprint"] == newest


def test_a_run_that_is_trained_anew_is_followed_though_its_steps_have_the_same_names(
    here: Path, tmp_path: Path
) -> None:
    shutil.copytree(here / "runs/tiny", tmp_path / "tiny", symlinks=True)
    with served(open_run(str(tmp_path / "tiny/newest"), CPU), also=lambda server: follow(server, 0.05)) as server:
        before = server.server.run
        time.sleep(0.3)
        assert server.server.run is before
        shutil.copytree(tmp_path / "tiny", tmp_path / "anew", symlinks=True)
        (tmp_path / "tiny").rename(tmp_path / "away")
        (tmp_path / "anew").rename(tmp_path / "tiny")
        until = time.monotonic() + 20
        while server.server.run is before:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert server.server.run.name == before.name


def test_a_damaged_checkpoint_is_passed_over(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "runs/tiny", tmp_path / "tiny", symlinks=True)
    folders = checkpoint.folders(tmp_path / "tiny")
    later = tmp_path / "later"
    folders[0].rename(later)
    with served(open_run(str(tmp_path / "tiny/newest"), CPU), also=lambda server: follow(server, 0.05)) as server:
        before = server.server.run.name
        data = bytearray((later / checkpoint.WEIGHTS).read_bytes())
        data[-1] ^= 1
        (later / checkpoint.WEIGHTS).write_bytes(data)
        later.rename(folders[0])
        time.sleep(1.0)
        assert server.server.run.name == before != f"tiny/{folders[0].name}"
        assert httpx.get(f"{server.url}/health").json()["checkpoint"] == before
    assert folders[0].name in capfd.readouterr().err


def test_a_checkpoint_that_could_not_be_opened_for_a_moment_is_tried_again(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "runs/tiny", tmp_path / "tiny", symlinks=True)
    newest, *_, older = checkpoint.folders(tmp_path / "tiny")
    calls = []

    def opened(*given: Any) -> Any:
        calls.append(given)
        if len(calls) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_run(*given)

    monkeypatch.setattr(llm.serving.server, "open_run", opened)
    run = open_run(str(tmp_path / "tiny" / older.name), CPU)
    with served(run, also=lambda server: follow(server, 0.02, retry=0.05)) as server:
        until = time.monotonic() + 20
        while server.server.run.name != f"tiny/{newest.name}":
            assert time.monotonic() < until
            time.sleep(0.02)
    assert len(calls) == 3 and "tried again in 0.05 s" in capfd.readouterr().err
