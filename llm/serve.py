"""python -m llm.serve [RUN]: OpenAI's API and a page for a trained run, also while it trains."""

import os
import socket
from contextlib import closing
from pathlib import Path

from llm.base.command import Parser
from llm.base.errors import RecipeError, optional, run
from llm.inference.sampling import INT8

PORT = 8000
KEY = "ONETEXT_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "serve",
        "Serve a run to any client of OpenAI's API, at http://HOST:PORT/v1, and a page to talk to it at /. Texts that "
        "are asked for at the same time are decoded together.",
        epilog=f"The key is read from the environment variable {KEY} or from --key-file; clients send it as their API "
        "key. SIGTERM or Ctrl-C ends the server after the answers in progress.",
    )
    parser.add_run()
    add = parser.add_argument
    add("--host", default=LOCAL[0], help="address to listen on (default: this machine alone); others need a key")
    parser.add_number("--port", default=PORT, most=65535, help=f"default {PORT}; 0: any that is free")
    add("--key-file", type=Path, metavar="FILE", help="file that holds the API key")
    add("--cors", action="append", metavar="ORIGIN", default=[], help="pages of this origin may ask too; * for all")
    add("--follow", action="store_true", help="serve the newest good checkpoint of a run that is still training")
    add("--int8", action="store_true", help=INT8)
    parser.add_number("--queue", default=128, least=1, help="texts that may wait (default 128); more get status 429")
    parser.add_number("--tokens", default=4096, least=1, help="at most this many new tokens an answer (default 4,096)")
    parser.add_number("--seconds", kind=float, default=600, least=0.1, help="longest time for an answer (default 600)")
    parser.add_number("--body", default=1 << 20, least=1, help="largest request, in bytes (default 1 MiB)")
    parser.add_number("--drain", kind=float, default=30, help="seconds for answers in progress at shutdown (30)")
    given = parser.parse_args(arguments)
    key = key_of(given.key_file)
    if given.host not in LOCAL and key is None:
        raise RecipeError(f"--host = {given.host} is open to others: set {KEY}, or name a --key-file")
    mend = "the server needs starlette and uvicorn: pip install -e '.[serve]'"
    optional("starlette", mend)
    optional("uvicorn", mend)
    with closing(listening(given.host, given.port)) as listener:
        from llm.inference.fast_decode import prepare_weights
        from llm.run_folder.loaded_run import find, open_run
        from llm.serving.answering import Limits
        from llm.serving.api import Server, application
        from llm.serving.engine import Engine
        from llm.serving.server import Uvicorn, configured, follow

        folder, which = find(given.run)
        opened = open_run(str(folder.absolute() / ("newest" if given.follow else which)))
        prepare_weights(opened.model, int8=given.int8)
        limits = Limits(given.body, tokens=given.tokens, seconds=given.seconds)
        server = Server(Engine(opened, given.queue, int8=given.int8), limits, key, given.cors)
        app = application(server, (lambda: follow(server)) if given.follow else None)
        shown = f"[{given.host}]" if ":" in given.host else given.host
        print(f"http://{shown}:{listener.getsockname()[1]}/ serves {opened.name}; Ctrl-C ends it", flush=True)
        Uvicorn(configured(app), server, given.drain).run([listener])
    return int(server.broken)


def key_of(path: Path | None) -> str | None:
    """The API key, or None. RecipeError where there is a file or a variable that holds none."""
    if path is None:
        where, key = KEY, os.environ.get(KEY, "")
        if not key:
            return None
    else:
        where = f"--key-file = {path}"
        try:
            key = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise RecipeError(f"{where} must hold a key of printable ASCII characters")
    return key


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. RecipeError where the address or the port is not to be had."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is too long
        if listener is not None:
            listener.close()
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"{host}:{port} cannot be served ({why}): name another --host or --port") from error
    return listener


if __name__ == "__main__":
    run(main)
