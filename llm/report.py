"""python -m llm.report [RUN...]: a page on what runs did, made from their records; --watch follows them."""

import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from llm.base.command import NAMED, Parser
from llm.base.errors import RecipeError, harmless, naming, reason, run, tell

PORT = 8765
LOCAL = ("127.0.0.1", "localhost")
TITLE = b": training report</title>"  # in the head of each page


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "report",
        "One self-contained HTML page on a run, finished or not, or on several: curves, yardsticks, samples, the plan "
        "and what came of it, events, and the keys that differ.",
    )
    parser.add_argument(
        "runs", nargs="*", default=[], metavar="RUN", help=f"{NAMED}; default: the run that recorded last"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the first run")
    parser.add_argument("--watch", action="store_true", help="serve it on this machine alone, reloaded as runs go on")
    parser.add_number("--port", default=PORT, most=65535, help=f"of --watch (default {PORT}; 0: any that is free)")
    given = parser.parse_args(arguments)
    if given.watch and given.out:
        raise RecipeError("--out is for a page in a file: leave it out, as --watch serves the page")
    from llm.run_folder.record import find

    folders = [find(name) for name in dict.fromkeys(given.runs or [None])]
    if given.watch:
        watch(folders, given.port)
        return
    from llm.base import atomic_io

    out = given.out or folders[0] / "report.html"
    with naming("--out"):
        atomic_io.check_writable(out)
        # Else a slip of the hand would replace a text or a recipe.
        if out.is_file() and out.stat().st_size and TITLE not in out.read_bytes()[: 1 << 20]:
            raise RecipeError(f"{out} is there and is no report: name another file, or move it away")
    atomic_io.write_bytes(out, page(folders))
    print(harmless(f"the report is in {out}"))


def page(folders: Sequence[Path], watch: str = "", nonce: str = "") -> bytes:
    """The page on the runs in `folders`, as they are now; with escapes for bytes of names that are no UTF-8."""
    from llm.insight import report
    from llm.run_folder.record import read

    records = [read(folder) for folder in folders]
    text = report.page(records, watch=watch, nonce=nonce, say=lambda text: tell(text, sys.stderr))
    return text.encode(errors="backslashreplace")


def watch(folders: Sequence[Path], port: int) -> None:
    """Serve the page on localhost until Ctrl-C. RecipeError where the port is taken."""
    try:
        with server(folders, port) as serving:
            print(f"http://{LOCAL[0]}:{serving.server_address[1]}/ follows the run; Ctrl-C ends it", flush=True)
            serving.serve_forever()
    except KeyboardInterrupt:
        print()


def server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page, and of its version at /version, to this machine alone."""
    made: dict[str, bytes] = {}  # the last page, by its version
    making = Lock()

    def version() -> str:
        paths = [folder / name for folder in folders for name in ("metrics.jsonl", "status.json")]
        found = [path.stat() for path in paths if path.exists()]
        return " ".join(f"{each.st_mtime_ns}-{each.st_size}" for each in found) or "none"

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the reader has left
                super().handle()

        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in LOCAL:  # a page elsewhere that says it is ours
                return self.answer(HTTPStatus.FORBIDDEN, b"only for this machine", "text/plain")
            if self.path == "/version":
                return self.answer(HTTPStatus.OK, version().encode(), "text/plain")
            if self.path != "/":
                return self.answer(HTTPStatus.NOT_FOUND, b"there is / alone", "text/plain")
            try:
                with making:
                    if (now := version()) not in made:
                        data = page(folders, now, secrets.token_hex(8))
                        made.clear()
                        made[now] = data
                    data = made[now]
            except Exception as error:  # of any kind: the next version may do
                return self.answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason(error).encode(), "text/plain")
            self.answer(HTTPStatus.OK, data, "text/html")

        def answer(self, status: HTTPStatus, data: bytes, kind: str) -> None:
            with suppress(ConnectionError):  # the reader has left
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *values: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((LOCAL[0], port), Handler)
    except OSError as error:
        raise RecipeError(f"--port = {port} cannot be served ({error.strerror}): name another one") from error


if __name__ == "__main__":
    run(main)
