"""How fast text becomes shards against sentencepiece alone, how much memory that takes, and how fast windows are read.

    python tests/benchmarks/preparation.py rate [MB]      encoding into shards / sentencepiece alone, alternating
    python tests/benchmarks/preparation.py memory [MB]    peak memory of the whole preparation, of 10 MB and of MB
    python tests/benchmarks/preparation.py windows        random windows of 513 tokens

The text is the packaged English one, over and over, the words of each article in another order every time: as long as
wanted, and no article equals another.
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
from pathlib import Path

import numpy as np

from llm.corpus import Corpus, wiki_documents
from llm.recipe import load
from llm.shards import Shards, write
from llm.tokenizer import Tokenizer

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


def write_all(documents: Iterable[bytes], folder: Path, tokenizer: Tokenizer) -> None:
    for _ in write(documents, folder / "shards", tokenizer, share=0.05, about={"fingerprint": ""}):
        pass


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def rate(folder: Path, megabytes: int) -> None:
    varied_text(folder / "text.txt", megabytes)
    recipe = load(recipe_file(folder, folder / "text.txt"))
    documents = list(Corpus(recipe.text).documents())
    size = sum(map(len, documents)) / 1e6
    Tokenizer.train(documents[:10_000], vocabulary=8192).save(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    texts = [document.decode() for document in documents]
    threads = len(os.sched_getaffinity(0))
    raw = tokenizer._processor

    def alone() -> None:
        for begin in range(0, len(texts), 20_000):
            raw.encode(texts[begin : begin + 20_000], num_threads=threads, return_type="numpy")

    def whole() -> None:
        write_all(Corpus(recipe.text).documents(), folder, tokenizer)

    write_all(documents[:100], folder, tokenizer)  # `datasets` imports torch when it is first used
    print(f"{size:.0f} MB, {len(texts)} documents, {threads} threads, {REPEATS} repeats")
    # On a machine that does other work at the same time, only processor time can be compared.
    for name, clock in (("wall", time.perf_counter), ("processor", time.process_time)):
        rates: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            raw_rate = size / seconds(alone, clock)
            shutil.rmtree(folder / "shards", ignore_errors=True)
            rates.append((raw_rate, size / seconds(whole, clock)))
        print(f"{name} time, MB/s: sentencepiece alone", spread([a for a, _ in rates]))
        print(f"{name} time, MB/s: text into shards   ", spread([w for _, w in rates]))
        print(f"{name} time: ratio                    ", spread([w / a for a, w in rates]))


def memory(folder: Path, megabytes: int) -> None:
    for size in (10, megabytes):
        varied_text(folder / "text.txt", size)
        recipe = recipe_file(folder, folder / "text.txt")
        process = subprocess.Popen([sys.executable, "-m", "llm.prepare", str(recipe)])
        began = time.perf_counter()
        _, status, usage = os.wait4(process.pid, 0)  # this process alone: its workers are threads
        print(f"{size} MB: peak {usage.ru_maxrss / 1024:.0f} MiB, {time.perf_counter() - began:.1f} s, status {status}")


def windows(folder: Path) -> None:
    documents = list(wiki_documents("en-us"))
    tokenizer = Tokenizer.train(documents, vocabulary=8192)
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
            rate(Path(folder), int(megabytes or 60))
        elif what == "memory":
            memory(Path(folder), int(megabytes or 300))
        elif what == "windows":
            windows(Path(folder))
        else:
            print(__doc__)


if __name__ == "__main__":
    main()
