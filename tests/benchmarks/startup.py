"""From the command to the first step, against the bare imports that it needs: python tests/benchmarks/startup.py [ROUNDS]

The text is prepared beforehand; the two commands run in turn.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VERBS = ("prepare", "sample", "evaluate", "verify", "show")
IMPORTS = "import torch, accelerate, safetensors.torch, sentencepiece, pyarrow, yaml, tqdm"


def seconds(command: list[str], folder: Path, until: str = "") -> tuple[float, float]:
    """Wall and CPU seconds of a command, or wall seconds to the first line that begins with `until`."""
    began, before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    reached = 0.0
    for line in process.stdout:
        if until and line.startswith(until) and not reached:
            reached = time.perf_counter() - began
    process.wait()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return reached or time.perf_counter() - began, cpu


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = str(ROOT / "recipes/quickstart.yaml")
        train = [
            sys.executable,
            str(ROOT / "launch/train.py"),
            recipe,
            "train.steps=1",
            "train.warmup=0",
            "tracking.every=1",
            "text.validation=0",
        ]
        commands = {
            "bare imports": ([sys.executable, "-c", IMPORTS], ""),
            "command to the first step": (train, "step 1/1"),
            **{f"llm.{verb} --help": ([sys.executable, "-m", f"llm.{verb}", "--help"], "") for verb in VERBS},
        }
        figures: dict[str, list[tuple[float, float]]] = {each: [] for each in commands}
        for round in range(-1, rounds):
            for each, (command, until) in commands.items():
                arguments = [*command, f"run=r{round + 1}"] if until else command
                result = seconds(arguments, folder, until)
                if round >= 0:
                    figures[each].append(result)
    base = statistics.median(wall for wall, _ in figures["bare imports"])
    print(f"{'seconds':28}{'min':>7}{'median':>8}{'max':>7}{'CPU median':>12}{'of imports':>12}")
    for each, results in figures.items():
        walls = [wall for wall, _ in results]
        middle = statistics.median(walls)
        print(
            f"{each:28}{min(walls):7.2f}{middle:8.2f}{max(walls):7.2f}{statistics.median(cpu for _, cpu in results):12.2f}{middle / base:12.2f}"
        )


if __name__ == "__main__":
    main()
