"""Whatever is sent gets a 4xx or a closed connection; the server goes on, and keeps neither memory nor open files."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

import llm.serving.server
from llm.run_folder.loaded_run import LoadedRun
from llm.serving.answering import Limits
from llm.serving.requests import ApiError, Chat, Completion, parsed
from tests.forks import ROOT
from tests.serving.conftest import Served, served

SECONDS = 0.4


@pytest.fixture(scope="module")
def server(tiny_run: LoadedRun) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.serving.server, "REQUEST_SECONDS", SECONDS)
        patch.setattr(llm.serving.server, "READ_SECONDS", 3 * SECONDS)
        with served(tiny_run, limits=Limits(body=10_000, body_seconds=SECONDS, tokens=100)) as found:
            yield found


@pytest.fixture(autouse=True)
def goes_on(server: Served) -> Iterator[None]:
    """After each of these, a request is answered, and nothing was refused as if the server were stopping or broken."""
    yield
    assert not [name for name in server.server.engine.counts if name.startswith("status_5")]
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "The", "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length"
    until = time.monotonic() + 10
    while server.server.active:
        assert time.monotonic() < until
        time.sleep(0.005)


def sent(port: int, data: bytes, *, half_close: bool = False, seconds: float = 20) -> bytes:
    """What comes back until the server closes; empty where it says nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            found = b""
            while more := connection.recv(65536):
                found += more
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return found


def post(body: bytes, path: str = "/v1/completions", length: int | None = None, extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{extra}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


BODIES = [
    b"", b"{", b"[]", b"null", b"1", b'"a"', b"{}", b'{"prompt": 5}', b'{"prompt": []}', b'{"prompt": [[]]}', b'{"prompt": [-1]}',
    b'{"prompt": [1.5]}', b'{"prompt": ["a", 3]}', b'{"prompt": [99999999999999999999999]}', b'{"prompt": [100000]}', b"\xff\xfe",
    b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -1}', b'{"prompt": "a", "temperature": "hot"}', b'{"prompt": "a", "top_p": 1e999}',
    b'{"prompt": "a", "top_p": 2}', b'{"prompt": "a", "min_p": NaN}', b'{"prompt": "a", "top_k": -3}', b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "n": 1000000}', b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "max_tokens": 1e300}', b'{"prompt": "a", "stop": ""}',
    b'{"prompt": "a", "stop": [1]}', b'{"prompt": "a", "seed": "x"}', b'{"prompt": "a", "logprobs": 99}', b'{"prompt": "a", "stream": "yes"}',
    b'{"prompt": "a", "model": 3}', b'{"prompt": "a", "x": 1}', b'{"prompt": "a", "prompt2": {"a": [[[[]]]]}}', b'{"prompt": "a"} trailing',
    b'{"prompt": ' + b"[" * 5000, b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", b'{"prompt": "' + b"river " * 1000 + b'"}',
    b'{"prompt": [1, 2, 3, NaN]}', b'{"prompt": ["\xff"]}', b'{"prompt": "a", "temperature": -Infinity}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "stop": ["a", "b", 3]}', b'{"prompt": "a", "stop": ' + json.dumps(["a"] * 17).encode() + b"}", b'{"prompt": true}',
    b'{"prompt": "a", "max_tokens": true}', b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": "a", "n": 16.0}', b'{"prompt": "a", "best_of": 0}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}', b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
    b'{"messages": []}', b'{"prompt": "a", "logit_bias": {"1": 5}}', b"\0" * 100, b'{"prompt": "a", "repetition_penalty": 0}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_none_gets_400_and_a_reason(server: Served, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        head, _, said = sent(server.port, post(body, path)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), head
        error = json.loads(said)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400"),  # TLS
        (b"GARBAGE\r\n\r\n", "400"),
        (b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", "403"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100_000, "400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", "431"),  # complete
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 9_000 + b"Connection: close\r\n\r\n", "431"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", "400"),
        (b"GET /health HTTP/1.0\r\n\r\n", "403"),
        (b"HEAD /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "405"),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "404"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "404"),
        (post(b'{"prompt": "\xff\xfe"}'), "400"),
        (post(b'{"prompt": "a", "temperature": NaN}'), "400"),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", "400"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "404"),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "404"),
        (b"GET /v1/models/../../x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "404"),
        (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "405"),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "405"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", "403"),
        (b"GET / HTTP/1.1\r\nHost: localhost.evil.example\r\nConnection: close\r\n\r\n", "403"),
        (b"GET /run HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nConnection: close\r\n\r\n", "403"),
        (b"GET /run HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nConnection: close\r\n\r\n", "403"),
        (post(b"", length=100_000_000), "413"),
        (post(b'{"prompt": "a"}', length=-5), "400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", "400"),
        (post(b'{"prompt": "a"', length=500), "408"),  # the rest never comes
    ],
)  # fmt: skip
def test_what_is_no_request_gets_a_4xx_or_is_closed(server: Served, data: bytes, statuses: str) -> None:
    answer = sent(server.port, data)
    assert answer == b"" or answer.split()[1].decode() == statuses


@pytest.mark.parametrize("prompt", ["river " * 200, [3] * 65], ids=["text", "ids"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_named(server: Served, prompt: Any, stream: bool) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "stream": stream}, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert "more than the context of 64" in answer.json()["error"]["message"]


FAULTS = [
    {"prompt": ["a", *[3] * 200_000]}, {"prompt": [1.5] * 200_000}, {"prompt": [[]] * 200_000}, {"prompt": [[1]] * 200_000},
    {"prompt": "a", "stop": [3] * 200_000}, {"prompt": "a", "logit_bias": {str(id): "x" for id in range(50_000)}},
]  # fmt: skip


@pytest.mark.parametrize("body", FAULTS, ids=range(len(FAULTS)))
def test_a_list_of_faults_is_refused_at_the_first(body: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        Completion.model_validate_json(json.dumps(body))
    assert refused.value.error_count() < 10  # to tell hundreds of thousands took 13 s, in which no other was served
    with pytest.raises(ApiError):
        parsed(Completion, json.dumps(body).encode())
    asked = {"messages": [{"role": "user", "content": "a"}]}
    for faulty in ({"messages": [{}] * 10_000}, asked | {"modalities": [1] * 10_000}):
        with pytest.raises(ValidationError) as refused:
            Chat.model_validate(faulty)
        assert refused.value.error_count() < 10


def test_old_and_rare_ways_to_ask_are_answered(server: Served) -> None:
    """HTTP/1.0, a stream to it, HEAD, several requests in one go, Expect: 100-continue, upper-case hosts."""
    asked = b'{"prompt": "The river", "max_tokens": 3, "temperature": 0, "stream": true}'
    old = sent(server.port, post(asked).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert old.startswith(b"HTTP/1.1 200 ") and old.endswith(b"data: [DONE]\n\n") and b"chunked" not in old
    head = sent(server.port, b"HEAD / HTTP/1.1\r\nHost: LOCALHOST:1\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    first = post(asked).replace(b"Connection: close\r\n", b"")
    assert sent(server.port, first + first + post(asked)).count(b"data: [DONE]") == 3
    assert b"HTTP/1.1 200 " in sent(server.port, post(asked, extra="Expect: 100-continue\r\n"))
    told = httpx.options(f"{server.url}/v1/completions")
    assert told.status_code == 405 and told.headers["allow"] == "POST"


def test_100_megabytes_are_not_read(server: Served) -> None:
    piece = b"x" * (1 << 20)
    for head in (post(b"", length=100 << 20), post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            answer = b""
            try:
                connection.sendall(head)
                for _ in range(100):
                    connection.sendall(b"100000\r\n" + piece + b"\r\n" if b"chunked" in head else piece)
            except (ConnectionResetError, BrokenPipeError):
                pass
            with suppress(ConnectionResetError):
                answer = connection.recv(65536)
        assert answer == b"" or answer.split()[1] == b"413"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("megabytes", [1, 3, 8])
def test_who_sends_too_much_is_told(server: Served, megabytes: int) -> None:
    """If the connection were closed while the client still sends, it would see a reset instead of the 413."""
    for _ in range(3):
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * (megabytes << 20)}, timeout=30)
        assert answer.status_code == 413 and "larger than 10,000 bytes" in answer.json()["error"]["message"]
    head = post(b"", extra="Expect: 100-continue\r\n").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    piece = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
    assert b"HTTP/1.1 413 " in sent(server.port, head + piece * megabytes + b"0\r\n\r\n")


def test_who_sends_nothing_or_slowly_is_closed(server: Served) -> None:
    """Slow-loris: no head, half a head, a head letter by letter, half a second head on a kept connection."""
    began = time.monotonic()
    assert sent(server.port, b"") == b""
    assert sent(server.port, b"GET / HTTP/1.1\r\nHost: loc") == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        try:
            for letter in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 400:
                connection.sendall(bytes([letter]))
                time.sleep(0.02)
            assert connection.recv(100) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost")
        while connection.recv(65536):
            pass
    assert time.monotonic() - began < 60


def test_idle_connections_keep_nobody_out(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.serving.server, "MOST_CONNECTIONS", 10)
    monkeypatch.setattr(llm.serving.server, "REQUEST_SECONDS", 60.0)
    with ExitStack() as idle:
        for _ in range(60):
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        for _ in range(3):
            assert httpx.get(f"{server.url}/health").status_code == 200
        assert len(server.uvicorn.server_state.connections) <= 12


def test_half_closed_connections_are_answered_or_closed(server: Served) -> None:
    for data in (b"", b"GET / HT", post(b'{"prompt": "a", "max_tokens": 100}'), post(b'{"prompt"', length=300)):
        answer = sent(server.port, data, half_close=True)
        assert answer == b"" or answer.split()[1].startswith((b"2", b"4"))
    server.idle()


def test_a_wrong_key_is_refused(tiny_run: LoadedRun, capfd: pytest.CaptureFixture[str]) -> None:
    with served(tiny_run, key="s3cret-key", origins=("https://editor.example",)) as kept:
        for given in (
            None,
            "",
            "Bearer",
            "Bearer wrong",
            "Bearer s3cret-ke",
            "Bearer s3cret-key2",
            "Basic s3cret",
            "Bearer é",
        ):
            headers = {} if given is None else {"Authorization": given.encode()}
            for path in ("/v1/models", "/run", "/metrics", "/v1/completions"):
                answer = httpx.get(f"{kept.url}{path}", headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        for host in ("x/health?", "x/?", "model.example/health#"):  # some of starlette's versions read a path from it
            answer = sent(kept.port, post(b'{"prompt": "a"}').replace(b"Host: localhost", f"Host: {host}".encode()))
            assert answer.split()[1] in (b"400", b"401"), answer
        right = {"Authorization": "Bearer s3cret-key"}
        assert httpx.get(f"{kept.url}/v1/models", headers={**right, "Host": "model.example"}).status_code == 200
        for given in ("bearer s3cret-key", "BEARER  s3cret-key"):
            assert httpx.get(f"{kept.url}/v1/models", headers={"Authorization": given}).status_code == 200
        assert httpx.get(f"{kept.url}/health").status_code == httpx.get(f"{kept.url}/").status_code == 200
        allowed = httpx.get(f"{kept.url}/v1/models", headers={**right, "Origin": "https://editor.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://editor.example"
        asked = {"Origin": "https://editor.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        assert httpx.options(f"{kept.url}/v1/completions", headers=asked).status_code == 200
        assert httpx.get(f"{kept.url}/v1/models", headers={**right, "Origin": "http://evil.example"}).status_code == 403
    said = capfd.readouterr()
    assert "s3cret" not in said.out + said.err


def test_a_reader_that_does_not_read_keeps_no_place(server: Served) -> None:
    """Its answer ends in its slot whether it is read or not; others are answered; its connection is closed in time."""
    connections = []
    for _ in range(3):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        whole = post(b'{"prompt": "a", "max_tokens": 100, "stream": true, "n": 16, "logprobs": 20}')
        connection.sendall(whole.replace(b"Connection: close\r\n", b"") * 8)
        connections.append(connection)
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "The", "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200
    until = time.monotonic() + 30
    while server.server.active or server.uvicorn.server_state.connections:
        assert time.monotonic() < until
        time.sleep(0.01)
    for connection in connections:
        connection.close()


def many(folder: Path, requests: int, *, bare: bool = False) -> None:
    """Requests of all kinds, or `bare` connections, to a server in a process of its own: as much memory and as many files after."""
    command = [sys.executable, "-m", "llm.serve", "tiny", "--port", "0", "--tokens", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("/")[2].rpartition(":")[2])
        kinds = [
            lambda: sent(port, post(b'{"prompt": "The river", "max_tokens": 2}')),
            lambda: sent(port, post(b'{"prompt": "The river", "max_tokens": 3, "stream": true, "logprobs": 2}')),
            lambda: sent(port, post(b'{"prompt": NaN')),
            lambda: socket.create_connection(("127.0.0.1", port)).close(),
            lambda: sent(port, b"nothing\r\n\r\n"),
            lambda: sent(port, post(b'{"prompt": "a"', length=500), half_close=True),
            lambda: sent(port, post(b'{"prompt": "a", "max_tokens": 20}'), half_close=True),
            lambda: sent(port, post(b"", length=1 << 30)),
        ]
        if bare:
            kinds = [lambda: socket.create_connection(("127.0.0.1", port), timeout=20).close()]

        def state() -> tuple[int, float]:
            """Open files and MB, once what was sent before is done with."""
            assert sent(port, post(b'{"prompt": "The river", "max_tokens": 2}')).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.2)
            memory = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            return len(list(Path(f"/proc/{process.pid}/fd").iterdir())), int(memory) * os.sysconf("SC_PAGE_SIZE") / 1e6

        for number in range(requests // 5):
            kinds[number % len(kinds)]()
        files, memory = state()
        for number in range(requests):
            kinds[number % len(kinds)]()
        files_after, memory_after = state()
        assert files_after <= files + 2
        assert memory_after < memory + 12, (memory, memory_after)  # MB
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_connections_that_say_nothing_leave_nothing(here: Path, count: int) -> None:
    many(here, count, bare=True)


def test_500_requests_leave_nothing(here: Path) -> None:
    many(here, 500)


@pytest.mark.slow
def test_10_000_requests_leave_nothing(here: Path) -> None:
    many(here, 10_000)
