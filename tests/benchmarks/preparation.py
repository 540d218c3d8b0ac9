"""How fast text becomes shards against sentencepiece alone, how much memory that takes, and how fast windows are read.

    python tests/benchmarks/preparation.py rate [MB|FILE]    text into shards / sentencepiece alone, alternating
    python tests/benchmarks/preparation.py memory [MB|FILE]  peak memory of the whole preparation, of 10 MB and of that
    python tests/benchmarks/preparation.py windows           random windows of 513 tokens

The text is the packaged English one, over and over, the words of each article in another order every time: as long as
wanted, and no article equals another. Its words are met again sooner than those of other text: `rate packaged` takes
the real text of three languages, each article once.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from llm.config.reading import load
from llm.data.documents import Corpus
from llm.data.pipeline import LARGE
from llm.data.shard_writer import write
from llm.data.shards import Shards
from llm.data.sources import wiki_documents
from llm.data.tokenizer import Tokenizer
from llm.distributed.threads import cores

REPEATS = 5
MARKER = b"<|endoftext|>\n"


def varied_text(path: Path, megabytes: int) -> None:
    """Write the text for a size."""
    draw, articles, size = random.Random(1), [document.split(b" ") for document in wiki_documents("en-us")], 0
    with path.open("wb") as file:
        while True:
            for words in articles:
                size += file.write(b" ".join(words) + b"\n" + MARKER)
                if size >= megabytes * 1_000_000:
                    return
                draw.shuffle(words)


def recipe_file(folder: Path, text: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"text: {{files: [{text}], cache: {folder / 'data'}, validation: 5%}}\n"
        "tokenizer: {vocabulary: 8192}\ntrain: {steps: 1}\n"
    )
    return path


def spread(values: list[float]) -> str:
    return f"min {min(values):.3f} median {statistics.median(values):.3f} max {max(values):.3f}"


def write_all(documents: Iterable[bytes], folder: Path, tokenizer: Tokenizer, processes: int = 0) -> None:
    about = {"fingerprint": ""}
    for _ in write(documents, folder / "shards", tokenizer, val_fraction=0.05, about=about, processes=processes):
        pass


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def rate(folder: Path, text: str) -> None:
    file = Path(text) if Path(text).is_file() else folder / "text.txt"
    if text == "packaged":
        file.write_bytes(
            MARKER.join(each for language in ("en-us", "fr-fr", "es-es") for each in wiki_documents(language))
        )
    elif text.isdigit():
        varied_text(file, int(text))
    recipe = load(recipe_file(folder, file))
    documents = list(Corpus(recipe.text).documents())
    size = sum(map(len, documents)) / 1e6
    Tokenizer.train(documents[:10_000], vocab_size=8192).save(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    texts = [document.decode() for document in documents]
    threads = cores()
    processes = threads if threads > 1 and size * 1e6 >= LARGE else 0
    raw = tokenizer._processor
    whole_ids = raw.encode(texts[:10_000], num_threads=threads, return_type="numpy")
    assert all(map(np.array_equal, tokenizer.encode_batch(texts[:10_000], threads), whole_ids))

    def alone() -> None:
        for begin in range(0, len(texts), 20_000):
            raw.encode(texts[begin : begin + 20_000], num_threads=threads, return_type="numpy")

    def whole() -> None:
        tokenizer._words.clear()  # as at a first start
        write_all(Corpus(recipe.text).documents(), folder, tokenizer, processes)

    write_all(documents[:100], folder, tokenizer)  # `datasets` imports torch when it is first used
    print(f"{size:.0f} MB, {len(texts)} documents, {threads} cores, {processes} processes, {REPEATS} repeats")
    # On a machine that does other work at the same time, only processor time can be compared.
    for name, clock in (("wall", time.perf_counter), ("processor", cpu_seconds)):
        rates: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            raw_rate = size / seconds(alone, clock)
            shutil.rmtree(folder / "shards", ignore_errors=True)
            rates.append((raw_rate, size / seconds(whole, clock)))
        print(f"{name} time, MB/s: sentencepiece alone", spread([a for a, _ in rates]))
        print(f"{name} time, MB/s: text into shards   ", spread([w for _, w in rates]))
        print(f"{name} time: ratio                    ", spread([w / a for a, w in rates]))


def memory(folder: Path, text: str) -> None:
    for size in ("10", text):
        file = folder / "text.txt" if size.isdigit() else Path(size)
        if size.isdigit():
            varied_text(file, int(size))
        recipe = recipe_file(folder, file)
        shutil.rmtree(folder / "data", ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-m", "llm.prepare", str(recipe)])
        began = time.perf_counter()
        most, high = 0, 0  # KiB: of all processes at one moment (pages that they share counted once), and of one alone
        while process.poll() is None:
            error_barrier = 0
            for pid in [str(process.pid), *children(process.pid)]:
                with suppress(OSError, IndexError):
                    high = max(high, int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]))
                    error_barrier += int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
            most = max(most, error_barrier)
            time.sleep(0.02)
        print(
            f"{file.stat().st_size / 1e6:.0f} MB: peak {most / 1024:.0f} MiB, of one process {high / 1024:.0f}, "
            f"{time.perf_counter() - began:.1f} s, status {process.returncode}",
            flush=True,
        )


def children(parent: int) -> list[str]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    with suppress(OSError):
        return [child for task in tasks for child in task.read_text().split()]
    return []


def windows(folder: Path) -> None:
    documents = list(wiki_documents("en-us"))
    tokenizer = Tokenizer.train(documents, vocab_size=8192)
    write_all(documents, folder, tokenizer)
    train = Shards.open(folder / "shards").train
    starts = np.random.default_rng(1).integers(0, train.tokens - 513, 100_000).tolist()

    def read() -> None:
        for start in starts:
            train.read(start, start + 513)

    rates = [len(starts) * 513 / seconds(read) / 1e6 for _ in range(REPEATS)]
    print("random windows of 513, million tokens/s:", spread(rates))


def main() -> None:
    what, megabytes = (*sys.argv[1:], "", "")[:2]
    with tempfile.TemporaryDirectory() as folder:
        if what == "rate":
            rate(Path(folder), megabytes or "60")
        elif what == "memory":
            memory(Path(folder), megabytes or "300")
        elif what == "windows":
            windows(Path(folder))
        else:
            print(__doc__)


if __name__ == "__main__":
    main()
