"""A text of any size, and what its preparation takes: memory of all processes, MB/s, kills, growth.

    python tests/benchmarks/big_text.py write FILE GB             the packaged English text, its words varied
    python tests/benchmarks/big_text.py prepare FILE [PART_MB]    peak memory and MB/s, of FILE and of its first PART_MB
    python tests/benchmarks/big_text.py kill FILE TIMES           killed TIMES times: the same bytes as undisturbed
    python tests/benchmarks/big_text.py append FILE               1 % more text at its end: seconds, before and after
    python tests/benchmarks/big_text.py open FILE                 seconds until the prepared text is opened

Each article comes again with its words in another order and some of them spelled otherwise, so that no document and
few lines repeat, and new words never end. `append` alters FILE. Prepared text lies in FILE.data, as is kept.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from llm.data.sources import wiki_documents

ROOT = Path(__file__).parents[2]
MARKER = b"<|endoftext|>\n"
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


@cache
def articles() -> list[list[bytes]]:
    return [article.split(b" ") for article in wiki_documents("en-us")]


def documents(seed: int) -> Iterator[bytes]:
    """The articles once, their words shuffled and one in fifty altered."""
    draw = np.random.default_rng(seed)
    for words in articles():
        mixed = [words[at] for at in draw.permutation(len(words)).tolist()]
        for at in draw.integers(0, len(words), len(words) // 50 + 1).tolist():
            mixed[at] = mixed[at].decode()[:3].encode() + LETTERS[draw.integers(0, len(LETTERS), 4)].tobytes()
        yield b" ".join(mixed) + b"\n"


def write(path: Path, size: int, seed: int = 0) -> None:
    with path.open("ab") as file:
        while size > 0:
            for document in documents(seed):
                size -= file.write(document + MARKER)
                if size <= 0:
                    break
            seed += 1


def start(text: Path, cache: Path) -> subprocess.Popen[bytes]:
    recipe = text.with_name("big.yaml")
    recipe.write_text(
        f"text: {{files: [{text}], cache: {cache}}}\ntokenizer: {{vocabulary: 8192}}\ntrain: {{steps: 1}}\n"
    )
    return subprocess.Popen([sys.executable, "-m", "llm.prepare", str(recipe)], cwd=ROOT, start_new_session=True)


def memory(session: int) -> int:
    """KiB of all processes of a session, pages that they share counted once."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) in (session, *children(session)):
                rollup = (path / "smaps_rollup").read_text()
                total += int(rollup.split("Pss:")[1].split()[0])
    return total


def children(parent: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def prepare(text: Path, cache: Path) -> tuple[float, float]:
    """Seconds, and MiB at the peak."""
    began, peak = time.perf_counter(), 0
    process = start(text, cache)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0
    return time.perf_counter() - began, peak / 1024


def digest(cache: Path) -> str:
    """Of all shards."""
    whole = hashlib.sha256()
    for path in sorted((cache / "shards").glob("*/*")):
        whole.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                whole.update(chunk)
    return whole.hexdigest()


def said(text: Path, cache: Path) -> None:
    seconds, peak = prepare(text, cache)
    size = text.stat().st_size / 1e6
    print(
        f"{text.name}: {size:,.0f} MB in {seconds:,.1f} s, {size / seconds:.2f} MB/s, peak {peak:,.0f} MiB", flush=True
    )


def main() -> None:
    what, text = sys.argv[1], Path(sys.argv[2]).absolute()
    cache, argument = text.with_suffix(".data"), (*sys.argv[3:], "")[0]
    if what == "write":
        text.unlink(missing_ok=True)
        write(text, int(float(argument) * 1e9))
    elif what == "prepare":
        for size in [int(argument)] if argument else []:
            part = text.with_suffix(".part")
            with text.open("rb") as source, part.open("wb") as sink:
                for _ in range(size):
                    sink.write(source.read(1_000_000))
                sink.write(source.readline())  # no character is cut
            shutil.rmtree(cache, ignore_errors=True)
            said(part, cache)
        shutil.rmtree(cache, ignore_errors=True)
        said(text, cache)
    elif what == "kill":
        expected, seconds = digest(cache), float(os.environ.get("SECONDS_WHOLE", "0")) or prepare(text, cache)[0]
        again, draw = text.with_suffix(".again"), random.Random(1)
        shutil.rmtree(again, ignore_errors=True)
        for _ in range(int(argument)):
            process = start(text, again)
            timer = threading.Timer(draw.uniform(0.05, 0.3) * seconds, os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            print(f"killed: status {process.wait()}", flush=True)
            timer.cancel()
        prepare(text, again)
        print("byte-identical" if digest(again) == expected else "NOT byte-identical")
    elif what == "append":
        write(text, text.stat().st_size // 100, seed=1 << 20)
        print("and 1 % more:")
        said(text, cache)
    elif what == "open":
        said(text, cache)


if __name__ == "__main__":
    main()
