"""A data set of the hub, served by a local server in its place, streams into shards: nothing of it is kept as text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.forks import ROOT, write_recipe, write_text

SHA = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that streaming one file of rows takes."""

    rows = b""
    asked: list[str]

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {self.path}")
        file = {"type": "file", "path": "rows.jsonl", "oid": "1" * 40, "size": len(self.rows)}
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            if path.endswith("/rows.jsonl"):
                return self._send(self.rows, {"ETag": '"1"', "X-Repo-Commit": SHA})
        elif "/tree/" in path or "/paths-info/" in path:
            return self._send([file])
        elif re.fullmatch(r"/api/datasets/owner/name(/revision/\w+)?", path):
            siblings = [{"rfilename": "rows.jsonl"}]
            return self._send({"id": "owner/name", "sha": SHA, "siblings": siblings, "private": False, "tags": []})
        self._send({"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, 404)

    def _send(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        begin, size = 0, len(data)
        if status == 200 and (wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            begin, last = int(wanted[1]), int(wanted[2] or size - 1)
            data, status = data[begin : last + 1], 206
            headers = {**(headers or {}), "Content-Range": f"bytes {begin}-{begin + len(data) - 1}/{size}"}
        self.send_response(status)
        for name, said in {**(headers or {}), "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    texts = [each for each in write_text(tmp_path / "rows.txt", documents=300).read_text().split("\n\n = ") if each]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    handler = type("Served", (Hub,), {"rows": rows, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_data_set_streams_into_shards_and_a_run_resumes_without_it(
    tmp_path: Path, hub: tuple[str, type[Hub]]
) -> None:
    endpoint, served = hub
    recipe = write_recipe(tmp_path, tmp_path / "text.txt", **{"text.files": "[hub:owner/name]"})
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def launch(script: list[str], *overrides: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *script, str(recipe), *overrides]
        return subprocess.run(command, cwd=tmp_path, env=environment | more, capture_output=True, text=True)

    done = launch(["-m", "llm.prepare"], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "train + " in done.stdout and any("/resolve/" in asked for asked in served.asked)
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size >= 2000]
    assert not [path for path in kept if b"The river rises" in path.read_bytes()], "no copy of the text is kept"
    shards = list((tmp_path / "cache/shards").glob("*/train-*.arrow"))
    assert len(shards) == 1
    done = launch([str(ROOT / "launch/train.py")], "train.steps=4", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "(made before)" in done.stdout, done.stderr
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    done = launch([str(ROOT / "launch/train.py")], "train.steps=4", **gone)
    assert done.returncode == 0 and "text: not read" in done.stdout, done.stderr
