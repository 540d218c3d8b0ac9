"""Proves that a recipe resumes exactly on this machine: trains a few steps of it in several ways and compares them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch
from safetensors import safe_open

from llm.base.errors import DiskError, DivergedError, GroupError, RecipeError, RefusedError, run
from llm.config.reading import key_of, load
from llm.config.resolving import vocabulary_for, with_vocabulary
from llm.config.schema import LENGTHS, Recipe
from llm.distributed.environment import measured_flops
from llm.model.cost import covered, flops_per_token
from llm.run_folder import checkpoint, trace
from llm.run_folder.verification import Verdict

# Relative difference allowed between losses that need not be equal to the bit: sums have another order, which Muon
# amplifies, and low precision rounds coarsely.
TOLERANCES = {"adamw": 1e-5, "muon": 1e-4}
LOW_PRECISION_TOLERANCE = 2e-2
KINDS = {kind.status: kind for kind in (RecipeError, DivergedError, DiskError, GroupError)}  # of a trial that fails
Start = Callable[[list[str], int, int], None]  # arguments of `child`, number of processes, their expected exit status


def child() -> None:
    """The entry point of a process that trains a trial: sys.argv is ["-c", recipe, last step, *overrides]."""

    def act() -> None:
        from llm.interop.pretrained import ready
        from llm.training.session import train

        recipe = load(Path(sys.argv[1]), sys.argv[3:])
        train(recipe, lambda recipe: ready(recipe, say=lambda text: None), until=int(sys.argv[2]))

    run(act)


@dataclass
class Trials:
    """Trains copies of one recipe, each in processes and a run folder of its own."""

    path: Path
    recipe: Recipe
    overrides: list[str]
    start: Start
    folders: list[Path] = field(default_factory=list)

    def train(self, name: str, *changes: str, world: int = 1, stops: Sequence[int] = ()) -> Path:
        """The folder of a finished run with `changes`, stopped after each of `stops` and resumed."""
        folder = Path("runs") / f"{self.recipe.run[:70]}-verify-{os.getpid()}-{name}"
        self.folders.append(folder)
        print(f"training: {name}", flush=True)
        for stop in (*stops, -1):
            arguments = [str(self.path), str(stop), *self.overrides, *changes, f"run={folder.name}"]
            self.start(arguments, world, 75 if stop >= 0 else 0)
        return folder


def start_processes(arguments: list[str], world: int, status: int) -> None:
    """Run `child` in `world` processes; an error with their last line unless each ends with `status`.

    Of the kind of their own where the recipe, the text, the disk or the group is at fault; otherwise RefusedError.
    """
    command = [sys.executable, "-c", "from llm.training import proof; proof.child()", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        ours = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
        environment = {**{name: value for name, value in os.environ.items() if name not in names}, **ours}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            lines = process.communicate()[1].strip().splitlines()
            if process.returncode != status:
                last = lines[-1] if lines else "without a message"
                fault = f"a run of the recipe ended with status {process.returncode}: {last.removeprefix('error: ')}"
                raise KINDS.get(process.returncode, RefusedError)(fault)
    finally:
        for process in processes:
            with process:  # waits for it
                process.kill()  # does nothing to one that has ended


def verify_recipe(path: Path, overrides: list[str], steps: int, start: Start = start_processes) -> list[Verdict]:
    """Train `steps` steps of the recipe whole, resumed, in other micro-batches and on two processes, and compare."""
    recipe = load(path, overrides)
    steps = min(steps, recipe.train.steps or steps)
    warmup = min(recipe.train.warmup, int(steps * (1 - recipe.train.decay)))
    others = [each for each in overrides if key_of(each) not in LENGTHS]
    common = [
        *others, f"train.steps={steps}", f"train.warmup={warmup}", "tracking.every=1", "tracking.wandb=off",
        "tracking.tensorboard=false", "evaluate.prompts=[]", f"evaluate.every={max(1, steps // 2 - 1)}",
        f"checkpoint.every={steps}", "from=", "machine.stop_after=0"]  # fmt: skip
    for source in recipe.text.sources:
        if source.epochs is not None:  # which a few steps cannot hold
            key = f"text.sources.{source.name}"
            common += [f"{key}.epochs=", f"{key}.weight={source.weight or 1:.12g}"]
    minutes = _expected_seconds(recipe, steps) // 60 + 1
    print(f"expected: about {minutes} min (up to five trials of {steps} steps)", flush=True)
    trials = Trials(path, recipe, common, start)
    try:
        return _verdicts(trials, recipe, steps)
    finally:
        for folder in trials.folders:
            shutil.rmtree(folder, ignore_errors=True)


def _verdicts(trials: Trials, recipe: Recipe, steps: int) -> list[Verdict]:
    exact, windows = recipe.machine.exact, recipe.windows_per_step
    whole = trials.train("whole")
    resumed = trials.train("resumed", stops=[steps // 2])
    verdicts = [Verdict("stopped and resumed: the same bits", same_bits(whole, resumed))]
    machine = json.loads((whole / "machine.json").read_text())
    tolerance = TOLERANCES[recipe.train.optimizer] if machine["precision"] == "fp32" else LOW_PRECISION_TOLERANCE
    micro_batch = machine["micro_batch"]
    other = micro_batch // 2 if micro_batch % 2 == 0 else 2 * micro_batch
    if not exact and windows % other == 0:
        trial = trials.train("micro-batch", f"machine.micro_batch={other}")
        promise = f"micro-batches of {other} instead of {micro_batch}: one curve"
        verdicts.append(Verdict(promise, same_curve(whole, trial, tolerance)))
    if windows % 2 == 0 and (os.cpu_count() or 1) > 1 and torch.cuda.device_count() != 1:
        # Bits depend on the number of threads, and `auto` would give each of two processes half of them.
        threads = [f"machine.threads={machine['threads']}"] if exact else []
        trial = trials.train("two-processes", *threads, world=2)
        fault = same_bits(whole, trial) if exact else same_curve(whole, trial, tolerance)
        verdicts.append(Verdict(f"two processes: {'the same bits' if exact else 'one curve'}", fault))
    return verdicts


def _expected_seconds(recipe: Recipe, steps: int) -> int:
    """Six starts of a process, and the steps at a third of the speed of this machine's matrix product."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_size = with_vocabulary(recipe, vocabulary_for(inf)).tokenizer.vocab_size  # at most
    flops = flops_per_token(recipe.model, covered(recipe.train, vocab_size)) * recipe.train.tokens_per_step * steps * 5
    return round(6 * 8 + 3 * flops / measured_flops(device, torch.float32, 1024))


def same_bits(a: Path, b: Path) -> str:
    """The first step and tensor in which two runs differ; empty where they are equal to the bit."""
    traces = [{line["step"]: line for line in trace.read(folder)} for folder in (a, b)]
    for step in sorted(traces[0].keys() | traces[1].keys()):
        if step not in traces[0] or step not in traces[1]:
            return f"step {step} is recorded in one of them only"
        if difference := trace.first_difference(traces[0][step], traces[1][step]):
            tensor = _first_tensor(a, b)
            return f"they part at step {step}: {difference}" + (f"; {tensor}" if tensor else "")
    return _first_tensor(a, b)


def same_curve(a: Path, b: Path, tolerance: float) -> str:
    """The first step at which two runs read other windows, or their losses differ by more than `tolerance` of one."""
    for first, second in zip(trace.read(a), trace.read(b), strict=True):
        losses, at = [float.fromhex(line["loss"]) for line in (first, second)], f"at step {first['step']}"
        if first["windows"] != second["windows"]:
            return f"{at} they read other windows"
        if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[0]):
            return f"{at} the losses are {losses[0]:.6f} and {losses[1]:.6f}, over {tolerance:g} apart"
    return ""


def _first_tensor(a: Path, b: Path) -> str:
    newest = [checkpoint.folders(folder)[0] for folder in (a, b)]
    for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        with safe_open(newest[0] / file, "pt") as one, safe_open(newest[1] / file, "pt") as two:
            for name in sorted(one.keys()):
                if not torch.equal(one.get_tensor(name), two.get_tensor(name)):
                    return f"at the end the first tensor that differs is {name}"
    return ""
