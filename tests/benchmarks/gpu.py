"""All that is measured on a GPU, in one go: python tests/benchmarks/gpu.py [--gigabytes 12] [--results FOLDER] [PART ...]

First tests/test_cuda.py; then steps of the recipes, Hugging Face's Trainer beside them and generation beside transformers', each
run held to so many gigabytes of the card, as on the one most people have. A part that fails or takes too long does not stop the others.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/benchmarks"
WIKI = ["text.files=[wiki-leads]", "evaluate.every=100k", "checkpoint.every=100k", "evaluate.prompts=[]", "tracking.every=1", "train.warmup=2"]  # fmt: skip
SMALL, MEDIUM, LARGE, QUICK = (f"recipes/{name}.yaml" for name in ("small", "medium", "large", "quickstart"))
MEDIUM_STEP = "train.tokens_per_step=65536"
VARIANTS = {
    "quickstart": (QUICK, "train.steps=60"),
    "quickstart, compiled": (QUICK, "train.steps=60 machine.compile=true"),
    "small": (SMALL, "train.steps=25"),
    "small, not compiled": (SMALL, "train.steps=25 machine.compile=false"),
    "small, dropout 10 %": (SMALL, "train.steps=25 model.dropout=10%"),
    "small, AdamW": (SMALL, "train.steps=25 train.optimizer=adamw train.learning_rate=1e-3"),
    "small, fp16": (SMALL, "train.steps=25 machine.precision=fp16"),
    "small, exact": (SMALL, "train.steps=25 machine.exact=true"),
    "medium": (MEDIUM, f"train.steps=12 {MEDIUM_STEP}"),
    "medium, 8 windows": (MEDIUM, f"train.steps=8 {MEDIUM_STEP} machine.micro_batch=8 machine.compile=false"),
    "medium, 8 windows, recompute": (
        MEDIUM,
        f"train.steps=8 {MEDIUM_STEP} machine.micro_batch=8 machine.compile=false machine.recompute=true",
    ),
    "large": (LARGE, "train.steps=6"),
    "large, one third of a step": (LARGE, "train.steps=8 train.tokens_per_step=65536"),
}


def variants(names: list[str], gigabytes: float) -> None:
    """Median tokens a second, utilisation, micro-batch and peak memory (GiB, allocated and reserved) of each."""
    print(f"{'':32}{'tokens/s':>10}{'of peak':>9}{'windows':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            recipe, changes = VARIANTS[name]
            line = [sys.executable, str(HERE / "trainers.py"), "--gigabytes", str(gigabytes), "--only", "ours", "--", str(ROOT / recipe)]  # fmt: skip
            line += [*WIKI, *changes.split(), f"text.cache={folder}/cache", f"run=variant-{index}"]
            done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                print(f"{name:32}failed: {done.stderr[-1500:]}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            numbers = f"{found['tokens_per_second']:10,.0f}{found['utilisation']:9.1%}{found['micro_batch']:9}"
            print(f"{name:32}{numbers}   {found['said']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["tests", "variants", "trainers", "generation"])
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--results", type=Path, help="a folder to keep what is printed in")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="variants")
    parser.add_argument("--shapes", nargs="*", default=["small", "medium", "large"], help="beside the other Trainer")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.parts == ["variants-here"]:
        return variants(given.only, given.gigabytes)
    held = ["--gigabytes", str(given.gigabytes)]
    parallel = ["-n", "8"] if subprocess.run([sys.executable, "-c", "import xdist"], stderr=subprocess.DEVNULL).returncode == 0 else []  # fmt: skip
    parts: dict[str, list[tuple[list[str], float]]] = {
        "tests": [(["-m", "pytest", str(ROOT / "tests/test_cuda.py"), "-p", "no:cacheprovider", "--durations=8", "-q", *parallel], 200)],
        "variants": [([str(Path(__file__).resolve()), "variants-here", *held, "--only", *given.only], 330)],
        "trainers": [([str(HERE / "trainers.py"), *held, "--precision", "bf16", "--rounds", str(given.rounds), "--shapes", *given.shapes], 300)],
        "generation": [
            ([str(HERE / "generation.py"), *(str(ROOT / each) for each in (QUICK, SMALL)), "--device", "cuda", "--precision", kind,
              "--rounds", "3"], 90) for kind in ("bf16", "fp32")
        ],
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for part in given.parts:
        for arguments, seconds in parts[part]:
            began = time.monotonic()
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
                said = file.read()
            said = f"\n## {part}: {status}, {time.monotonic() - began:.0f} s\n{said}"
            print(said, flush=True)
            if given.results:
                with (given.results / "gpu.txt").open("a") as kept:
                    kept.write(said)


if __name__ == "__main__":
    main()
