"""The server under load: python tests/benchmarks/serving.py RUN [--clients 1 4 16 64] [--tokens 100] [--rounds 3] [--gguf FILE]

The server runs in a process of its own, the clients in this one. Each client streams one answer of exactly
--tokens tokens, greedy, of another prompt; all start at once. One at a time, as many requests follow one another. Printed are tokens/s of all clients together and milliseconds
to the first token, min/median/max over rounds and clients, and whether each answer equals the one alone, to the letter. With
--gguf, an f32 export of the same run, one client is compared with llama-cpp-python, in turn.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "My",
    "self",
    "Har",
    "is",
    "the",
    "river",
    "of",
    "a",
    "town",
    "in",
    "north",
    "by",
    "which",
    "its",
    "church",
    "was",
    "built",
    "and",
    "later",
]


def prompt_of(number: int) -> str:
    return " ".join(WORDS[(number * 5 + step) % len(WORDS)] for step in range(3 + number % 6))


async def answer(port: int, number: int, tokens: int) -> tuple[str, float, int]:
    """Text, seconds to the first token, and how many tokens came. Read raw, so that the clients leave the cores to the server."""
    body = {"prompt": prompt_of(number), "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first, said = time.perf_counter(), 0.0, b""
    writer.write(head.encode() + data)
    while piece := await reader.read(1 << 16):
        said += piece
        if not first and b"data: {" in said:
            first = time.perf_counter() - began
    writer.close()
    assert said.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in said, said[:500]
    events = [json.loads(line) for line in re.findall(rb"data: ({.*})", said)]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, first, events[-1]["usage"]["completion_tokens"]


async def load(port: int, clients: int, tokens: int, alone: dict[int, str]) -> tuple[float, list[float]]:
    """Tokens/s of `clients` at once, and seconds to the first token of each."""
    began = time.perf_counter()
    found = await asyncio.gather(*(answer(port, number, tokens) for number in range(clients)))
    seconds = time.perf_counter() - began
    for number, (text, _, _) in enumerate(found):
        assert text == alone[number], f"client {number} got another text than alone"
    return sum(count for _, _, count in found) / seconds, [first for _, first, _ in found]


async def one_at_a_time(port: int, tokens: int, requests: int) -> tuple[float, list[float], dict[int, str]]:
    began = time.perf_counter()
    found = [await answer(port, number, tokens) for number in range(requests)]
    seconds = time.perf_counter() - began
    texts = {number: text for number, (text, _, _) in enumerate(found)}
    return sum(count for _, _, count in found) / seconds, [first for _, first, _ in found], texts


def told(name: str, rates: list[float], firsts: list[float], base: float) -> None:
    low, middle, high = (f([first * 1e3 for first in firsts]) for f in (min, statistics.median, max))
    rate = statistics.median(rates)
    print(
        f"{name:22}{min(rates):8,.0f}{rate:8,.0f}{max(rates):8,.0f}   {low:8,.0f}{middle:8,.0f}{high:8,.0f}{rate / base:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path)
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llm.serve", given.run, "--port", "0"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("/")[2].rpartition(":")[2])
        most = max(given.clients)
        _, _, alone = asyncio.run(one_at_a_time(port, given.tokens, most))  # which also warms it
        rates: dict[str, list[float]] = {}
        firsts: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            rate, first, _ = asyncio.run(one_at_a_time(port, given.tokens, 8))
            rates.setdefault("one at a time", []).append(rate)
            firsts.setdefault("one at a time", []).extend(first)
            for clients in given.clients:
                rate, first = asyncio.run(load(port, clients, given.tokens, alone))
                rates.setdefault(f"{clients} clients", []).append(rate)
                firsts.setdefault(f"{clients} clients", []).extend(first)
        print(f"{'':22}{'tokens/s min, median, max':>24}   {'ms to the first token':>24}    gain")
        for name in rates:
            told(name, rates[name], firsts[name], statistics.median(rates["one at a time"]))
        if given.gguf:
            beside_llama_cpp(port, given.gguf, given.tokens, given.rounds)
    finally:
        server.terminate()
        server.wait(60)


def beside_llama_cpp(port: int, gguf: Path, tokens: int, rounds: int) -> None:
    """One client of the server and llama-cpp-python on the same weights, in turn."""
    import llama_cpp

    theirs: Any = llama_cpp.Llama(str(gguf), n_ctx=256, n_threads=2, verbose=False, seed=0)
    rates: dict[str, list[float]] = {"server, one client": [], "llama.cpp": []}
    for _ in range(rounds + 1):
        rates["server, one client"].append(asyncio.run(one_at_a_time(port, tokens, 4))[0])
        began, count = time.perf_counter(), 0
        for number in range(4):
            said = theirs(prompt_of(number), max_tokens=tokens, temperature=0, repeat_penalty=1.0)
            count += said["usage"]["completion_tokens"]
        rates["llama.cpp"].append(count / (time.perf_counter() - began))
    for name, found in rates.items():
        print(f"{name:22}{min(found[1:]):8,.0f}{statistics.median(found[1:]):8,.0f}{max(found[1:]):8,.0f}")


if __name__ == "__main__":
    main()
