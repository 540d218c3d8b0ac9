"""All that is measured on a GPU, in one go: python tests/benchmarks/gpu.py [--gigabytes 12] [--results FOLDER] [PART ...]

First tests/test_cuda.py; then steps of the recipes with Hugging Face's Trainer beside them, each held to so many gigabytes of the
card, as on the one most people have; then generation beside transformers'. A part that fails or takes too long does not stop the others.
Runs are forked from this process, which has imported all and left CUDA alone.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[2]))

from tests.benchmarks import trainers
from tests.forks import ended, script, start

HERE = ROOT / "tests/benchmarks"
WIKI = ["text.files=[wiki-leads]", "evaluate.every=100k", "checkpoint.every=100k", "evaluate.prompts=[]", "tracking.every=1", "train.warmup=2"]  # fmt: skip
PLAIN = "train.optimizer=adamw train.learning_rate=1e-3 train.weight_decay=0.1 model.dropout=0 train.decay=0 machine.precision=bf16"
STEP = "train.tokens_per_step=65536"
SOME = "train.steps=8 machine.micro_batch=8 machine.compile=false"
RUNS = {  # in turn, so that each is beside what it is compared with
    "small, AdamW": ("small", f"train.steps=25 {PLAIN}"),
    "small, transformers": ("small", f"train.steps=12 {PLAIN}"),
    "small, AdamW, again": ("small", f"train.steps=25 {PLAIN}"),
    "small, transformers, again": ("small", f"train.steps=12 {PLAIN}"),
    "medium, AdamW": ("medium", f"train.steps=10 {STEP} {PLAIN}"),
    "medium, transformers": ("medium", f"train.steps=8 {STEP} {PLAIN}"),
    "large, AdamW": ("large", f"train.steps=7 {STEP} {PLAIN}"),
    "large, transformers": ("large", f"train.steps=6 {STEP} {PLAIN}"),
    "small": ("small", "train.steps=25"),
    "small, not compiled": ("small", "train.steps=25 machine.compile=false"),
    "small, dropout 10 %": ("small", "train.steps=25 model.dropout=10%"),
    "small, fp16": ("small", "train.steps=25 machine.precision=fp16"),
    "small, exact": ("small", "train.steps=25 machine.exact=true"),
    "medium": ("medium", f"train.steps=10 {STEP}"),
    "medium, 8 windows, eager": ("medium", f"{SOME} {STEP}"),
    "medium, 8 windows, eager, recompute": ("medium", f"{SOME} {STEP} machine.recompute=true"),
    "large": ("large", f"train.steps=7 {STEP}"),
    "quickstart": ("quickstart", "train.steps=60"),
    "quickstart, compiled": ("quickstart", "train.steps=60 machine.compile=true"),
}


def held(gigabytes: float, act: Callable[[], None]) -> None:
    """The act, in a process that gets no more of the card; then how much it took at most (GiB, allocated and reserved)."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / torch.cuda.mem_get_info()[1]))
    try:
        act()
    finally:
        print(
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} of {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB"
        )


def steps(names: list[str], gigabytes: float, say: Callable[[str], None]) -> None:
    """Median tokens a second, utilisation, micro-batch and peak memory of each of RUNS."""
    import transformers  # noqa: F401  # once, for all children

    say(f"{'':38}{'tokens/s':>10}{'of peak':>9}{'windows':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, run in enumerate(names):
            recipe, changes = RUNS[run]
            path, overrides = (
                str(ROOT / f"recipes/{recipe}.yaml"),
                [*WIKI, *changes.split(), f"run=run-{index}", f"text.cache={ROOT / 'data'}"],
            )
            theirs = "transformers" in run
            act = partial(trainers.theirs, path, gigabytes, overrides) if theirs else script(ROOT / "launch/train.py", path, *overrides)  # fmt: skip
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
            began = time.monotonic()
            try:
                done = ended(start(partial(held, gigabytes, act), folder), folder, seconds=100)
            except AssertionError as error:
                say(f"{run:38}{error}")
                continue
            if done.status:
                say(f"{run:38}failed: {done.err[-1500:]}")
                continue
            said = "; ".join(line for line in done.out.splitlines() if line.startswith(("peak", "machine.compile")))
            if theirs:
                found = next(json.loads(line) for line in done.out.splitlines() if line.startswith('{"'))
            else:
                lines = list(map(json.loads, (folder / f"runs/run-{index}/metrics.jsonl").read_text().splitlines()))
                found = {key: statistics.median([line[key] for line in lines if key in line][3:]) for key in ("tokens_per_second", "utilisation")}  # fmt: skip
                found |= json.loads((folder / f"runs/run-{index}/machine.json").read_text())
            numbers = f"{found['tokens_per_second']:10,.0f}{found.get('utilisation', 0):9.1%}{found['micro_batch']:9}"
            say(f"{run:38}{numbers}   {said}   ({time.monotonic() - began:.0f} s)")


def command(arguments: list[str], seconds: float) -> str:
    """What a command of its own printed, within so many seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = "stopped"
        file.seek(0)
        return f"status {status}\n{file.read()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["tests", "steps", "generation"])
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--results", type=Path, help="a folder to keep what is printed in")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS, help="of the steps")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)
        if given.results:
            with (given.results / "gpu.txt").open("a") as kept:
                kept.write(f"{text}\n")

    parallel = ["-n", "8"] if subprocess.run([sys.executable, "-c", "import xdist"], stderr=subprocess.DEVNULL).returncode == 0 else []  # fmt: skip
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=5", "-q", *parallel]
    generation = [
        str(HERE / "generation.py"),
        *(str(ROOT / f"recipes/{each}.yaml") for each in ("quickstart", "small")),
    ]
    for part in given.parts:
        say(f"\n## {part}")
        if part == "tests":
            say(command([*tests, str(ROOT / "tests/test_cuda.py"), str(ROOT / "tests/test_dropout.py")], 300))
        elif part == "steps":
            steps(given.only, given.gigabytes, say)
        elif part == "generation":
            for kind in ("bf16", "fp32"):
                say(command([*generation, "--device", "cuda", "--precision", kind, "--rounds", "3"], 90))
        elif part == "quickstart":
            say(command([str(ROOT / "launch/train.py"), str(ROOT / "recipes/quickstart.yaml"), "run=on-the-gpu"], 90))


if __name__ == "__main__":
    main()
