"""python -m llm.verify RECIPE: does it resume to the bit on this machine? python -m llm.verify RUN: is it whole?"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.base.errors import LLMError, RecipeError, RefusedError, run
from llm.config.reading import load
from llm.config.schema import Recipe

STEPS = 8
# Of losses that need not be equal to the bit: another order of sums, which Muon amplifies, and bf16 rounds coarsely.
TOLERANCES = {"adamw": 1e-5, "muon": 1e-4}
LOOSE = 2e-2
Start = Callable[[list[str], int, int], None]


@dataclass(frozen=True)
class Verdict:
    """`fault` says where and how the promise was broken; empty where it was kept."""

    promise: str
    fault: str


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llm.verify",
        description="A recipe: train some steps of it whole, stopped and resumed, in other micro-batches and on two "
        "processes, and compare. A run: read every file of it again, against its sha256.",
    )
    parser.add_argument("what", help="a recipe (.yaml), or a run under runs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe, such as machine.exact=true"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps to train each time (default {STEPS})")
    given = parser.parse_args()
    if given.what.endswith((".yaml", ".yml")):
        if given.steps < 4:
            raise RecipeError(f"--steps = {given.steps}: at least 4 are expected")
        verdicts = verify_recipe(Path(given.what), given.overrides, given.steps)
    else:
        verdicts = verify_run(given.what)
    broken = 0
    for verdict in verdicts:
        print(
            f"{'broken' if verdict.fault else 'kept':7}{verdict.promise}{': ' + verdict.fault if verdict.fault else ''}"
        )
        broken += bool(verdict.fault)
    if broken:
        raise RefusedError(f"{broken} of {len(verdicts)} promises are broken")


# ------------------------------------------------------------------------------------------------- a recipe


def child() -> None:
    """What a process of `verify_recipe` runs: sys.argv is ["-c", recipe, last step, *overrides]."""

    def act() -> None:
        from llm.interop.pretrained import ready
        from llm.training.session import train

        train(
            load(Path(sys.argv[1]), sys.argv[3:]),
            lambda recipe: ready(recipe, say=lambda text: None),
            until=int(sys.argv[2]),
        )

    run(act)


def verify_recipe(path: Path, overrides: list[str], steps: int = STEPS, start: Start | None = None) -> list[Verdict]:
    """Train `steps` steps of the recipe in several ways, in processes of their own, and compare what they leave.

    `start` runs `child` with these arguments in so many processes, each of which is to end with this status.
    """
    start = start or _start
    recipe = load(path, overrides)
    steps = min(steps, recipe.train.steps or steps)
    warmup = min(recipe.train.warmup, int(steps * (1 - recipe.train.decay)))
    common = [
        *overrides, f"train.steps={steps}", f"train.warmup={warmup}", "tracking.every=1", "tracking.wandb=off",
        "tracking.tensorboard=false", "evaluate.prompts=[]", f"evaluate.every={max(1, steps // 2 - 1)}",
        f"checkpoint.every={steps}", "from="]  # fmt: skip
    print(f"expected: about {_expected(recipe, steps) // 60 + 1} min for {steps} steps, up to five times", flush=True)
    folders: list[Path] = []

    def trial(name: str, *changes: str, world: int = 1, stops: Sequence[int] = ()) -> Path:
        folder = Path("runs") / f"{recipe.run[:80]}-verify-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folders.append(folder)
        print(f"training: {name}", flush=True)
        for stop in (*stops, -1):
            arguments = [str(path), str(stop), *common, *changes, f"run={folder.name}"]
            start(arguments, world, 75 if stop > 0 else 0)
        return folder

    try:
        whole = trial("whole")
        verdicts = [
            Verdict("stopped and resumed: the same bits", same_bits(whole, trial("resumed", stops=[steps // 2])))
        ]
        machine = json.loads((whole / "machine.json").read_text())
        close = TOLERANCES[recipe.train.optimizer] if machine["precision"] == "fp32" else LOOSE
        windows, micro_batch = recipe.windows_per_step, machine["micro_batch"]
        other = micro_batch // 2 if micro_batch % 2 == 0 else 2 * micro_batch
        if windows % other == 0 and other > 0 and not recipe.machine.exact:
            trialled = trial("micro-batch", f"machine.micro_batch={other}")
            verdicts.append(
                Verdict(
                    f"micro-batches of {other} instead of {micro_batch}: one curve", one_curve(whole, trialled, close)
                )
            )
        if windows % 2 == 0 and (os.cpu_count() or 1) > 1 and _two_devices():
            trialled = trial("two-processes", world=2)
            if recipe.machine.exact:
                verdicts.append(Verdict("two processes: the same bits", same_bits(whole, trialled)))
            else:
                verdicts.append(Verdict("two processes: one curve", one_curve(whole, trialled, close)))
        return verdicts
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _start(arguments: list[str], world: int, status: int) -> None:
    """Run `child` in `world` processes; RefusedError with their last line unless each ends with `status`."""
    command = [sys.executable, "-c", "import llm.verify; llm.verify.child()", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        ours = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
        environment = {**{name: value for name, value in os.environ.items() if name not in names}, **ours}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    for process in started:
        said = process.communicate()[1].strip().splitlines()
        if process.returncode != status:
            raise RefusedError(
                f"a run of the recipe ended with status {process.returncode}: {said[-1] if said else 'no word'}"
            )


def _two_devices() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.device_count() > 1


def _expected(recipe: Recipe, steps: int) -> int:
    """Seconds: a start for each of six processes, and the steps at a third of this machine's matrix product."""
    import torch

    from llm.distributed.environment import measured_flops
    from llm.model.cost import flops_per_token

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = flops_per_token(recipe.model, recipe.tokenizer.vocabulary) * recipe.train.tokens_per_step * steps * 5
    return round(6 * 8 + 3 * flops / measured_flops(device, torch.float32, 1024))


def same_bits(a: Path, b: Path) -> str:
    """The first step and tensor in which two runs differ; empty where they are equal to the bit."""
    from llm.run_folder.trace import parted, read

    records = [{line["step"]: line for line in read(folder)} for folder in (a, b)]
    for step in sorted(records[0].keys() | records[1].keys()):
        if step not in records[0] or step not in records[1]:
            return f"step {step} is recorded in one of them only"
        if what := parted(records[0][step], records[1][step]):
            return f"they part at step {step}: {what}{_first_tensor(a, b)}"
    return _first_tensor(a, b).lstrip("; ")


def one_curve(a: Path, b: Path, tolerance: float) -> str:
    """The first step in which two runs read other windows, or their losses differ by more than `tolerance` of it."""
    from llm.run_folder.trace import read

    for first, second in zip(read(a), read(b), strict=True):
        losses = [float.fromhex(line["loss"]) for line in (first, second)]
        if first["windows"] != second["windows"]:
            return f"at step {first['step']} they read other windows"
        if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[0]):
            return (
                f"at step {first['step']} the losses are {losses[0]:.6f} and {losses[1]:.6f}, over {tolerance:g} apart"
            )
    return ""


def _first_tensor(a: Path, b: Path) -> str:
    import torch
    from safetensors import safe_open

    from llm.run_folder import checkpoint

    newest = [checkpoint.folders(folder)[0] for folder in (a, b)]
    for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        with safe_open(newest[0] / file, "pt") as one, safe_open(newest[1] / file, "pt") as two:
            for name in sorted(one.keys()):
                if not torch.equal(one.get_tensor(name), two.get_tensor(name)):
                    return f"; at the end the first tensor that differs is {name}"
    return ""


# ------------------------------------------------------------------------------------------------- a run


def verify_run(name: str) -> list[Verdict]:
    """Read every file of a run again, against what was recorded of it."""
    from llm.base import atomic_io
    from llm.data import hf_tokenizer
    from llm.data.shards import of_run
    from llm.optim import time_budget
    from llm.run_folder import checkpoint, trace
    from llm.run_folder.loaded_run import find

    folder, _ = find(name)
    verdicts, tokenizers = [], set()

    def look(promise: str, act: Any) -> None:
        try:
            act()
            verdicts.append(Verdict(promise, ""))
        except (LLMError, OSError, KeyError, ValueError) as error:
            verdicts.append(Verdict(promise, " ".join(str(error).split())))

    def opened(path: Path) -> None:
        tokenizers.add(checkpoint.open_checkpoint(path).manifest["tokenizer"])

    def tokenizer() -> None:
        found = hf_tokenizer.load(folder / "tokenizer").fingerprint
        if tokenizers - {found}:
            raise RefusedError("it is not the one that the checkpoints were trained with")

    for path in checkpoint.folders(folder):
        look(f"{path.name}: every file has its sha256; to be resumed from", lambda path=path: opened(path))
    look("identity: it matches its own digest", lambda: checkpoint.identity(folder))
    look("tokenizer: the checkpoints' own", tokenizer)
    look("shards: every file has its sha256", lambda: of_run(folder, verify=True))
    look("fingerprints: an unbroken chain", lambda: trace.verify_chain(folder))
    if (folder / time_budget.RECORD).exists():
        look("plan: it matches its own digest", lambda: atomic_io.read_checksummed(folder / time_budget.RECORD))
    look("recipe: reads and resolves", lambda: load(folder / "recipe.yaml"))
    return verdicts


if __name__ == "__main__":
    run(main)
