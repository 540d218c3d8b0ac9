"""The machine half of a recipe met with this machine: processes, device, and what every `auto` comes to.

Precision, threads and micro-batch are part of what decides a run's bits, so what was found once is kept in the run.
"""

import ctypes
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, patch_environment

from llm import __version__, cost, group, store, threads
from llm.errors import GroupError, RecipeError
from llm.recipe import Recipe, flat

CPU_TOKENS = 2048  # of a micro-batch on a CPU: more are no faster there
EXACT_MICRO_BATCHES = (8, 4, 2)  # of a step, where machine.exact chooses: as many processes can share them
RECORD = "machine.json"


def threads_of(recipe: Recipe, known: dict[str, Any]) -> int:
    """CPU threads of this process: as the recipe says, else its share of the machine's cores."""
    if recipe.machine.threads != "auto":
        return recipe.machine.threads
    if recipe.machine.exact and "threads" in known:  # part of what decides the bits
        return int(known["threads"])
    return threads.share()


def asked_for() -> int | None:
    """How many processes the `accelerate launch` above this process was asked for, where that can be seen (Linux)."""
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    launchers = ("accelerate", "accelerate-launch")
    if not any(Path(word).name in launchers or "accelerate.commands" in word for word in line):
        return None
    options = " ".join(line[: line.index(sys.argv[0])] if sys.argv[0] in line else line)
    if found := re.search(r"--num[_-]processes[ =]+(\d+)", options):
        return int(found[1])
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    named = re.search(r"--config[_-]file[ =]+(\S+)", options)
    config = Path(named[1]) if named else home / "accelerate" / "default_config.yaml"
    if not config.expanduser().is_file() or ("--cpu" in options and not named):  # then accelerate reads no default
        return None
    found = re.search(r"(?m)^num_processes: *(\d+)", config.expanduser().read_text(errors="replace"))
    return int(found[1]) if found else None


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def precision_of(recipe: Recipe) -> str:
    """What the recipe says, or what this device multiplies fast."""
    wanted = recipe.machine.precision
    if wanted == "fp16" and not torch.cuda.is_available():
        raise RecipeError("machine.precision = fp16 needs a CUDA device: take bf16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if has_accelerator():
        return "fp32"
    # Some CPUs multiply bf16 twice as fast as fp32, others hundreds of times slower: only trying tells.
    device = torch.device("cpu")
    gain = cost.measured_flops(device, torch.bfloat16) / cost.measured_flops(device, torch.float32)
    return "bf16" if gain > 1.3 else "fp32"


def settled(recipe: Recipe, run: Path, council: group.Council) -> Recipe:
    """The recipe with every `auto` of its machine half settled, but for the micro-batch of an accelerator.

    What the run settled before stays. The first process decides for all.
    """
    record = run / RECORD
    known = store.read_sealed(record) if record.exists() else {}
    torch.set_num_threads(threads_of(recipe, known))
    threads.yield_to_neighbours()
    names: tuple[Any, ...] = ("fp32", "bf16", "fp16")
    precision = known.get("precision") if recipe.machine.precision == "auto" else None
    precision = names[council.largest(names.index(precision or precision_of(recipe)) if group.rank() == 0 else 0)]
    micro_batch: Any = recipe.machine.micro_batch
    if micro_batch == "auto":
        share = recipe.windows_per_step // group.world()
        fitting = [
            n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * recipe.model.context <= CPU_TOKENS)
        ]
        if recipe.machine.exact:  # part of what decides the bits, so it must not depend on the world
            windows = recipe.windows_per_step
            fitting = [n for n in range(1, windows + 1) if windows % n == 0 and windows // n in EXACT_MICRO_BATCHES]
            fitting = fitting[:1] or [1]
        kept = known.get("world") == group.world() or recipe.machine.exact
        micro_batch = council.largest(known.get("micro_batch", 0) if kept and group.rank() == 0 else 0)
        micro_batch = micro_batch or (max(fitting, default=1) if not has_accelerator() else "auto")
    return replace(
        recipe,
        machine=replace(recipe.machine, precision=precision, micro_batch=micro_batch, threads=torch.get_num_threads()),
    )


def start_group(recipe: Recipe) -> tuple[Accelerator, group.Council, Recipe]:
    """The processes, met and counted. GroupError where they are not those that were asked for."""
    on_cpu = not has_accelerator()
    asked = asked_for()
    if asked is not None and asked != group.world():
        raise GroupError(
            f"{asked} processes were asked for, but this launch line starts {group.world()}: say "
            f"`accelerate launch --multi_gpu --num_processes {asked}`, without --cpu on a machine without GPUs too, or "
            f"`torchrun --nproc_per_node {asked}`"
        )
    if os.environ.pop("ACCELERATE_USE_FSDP", "") == "true" and recipe.machine.shard == "none":
        group.say("the accelerate configuration asks for FSDP: machine.shard = full")
        recipe = replace(recipe, machine=replace(recipe.machine, shard="full"))
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # read by torchrun's processes before the first Accelerator
    if torch.cuda.is_available():
        repeat_bits()
    if group.world() > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", timeout=group.HUNG)
    council = group.Council()
    run = Path("runs") / recipe.run
    with council.together():
        versions = {"torch": torch.__version__, "accelerate": accelerate.__version__, "onetext-llm": __version__}
        council.agree("versions", versions, "install the same version everywhere")
        same = {name: value for name, value in flat(recipe).items() if name != "text.cache"}  # may be a disk of its own
        council.agree("recipe", same, "start every process with the same recipe and overrides")
        recipe = settled(recipe, run, council)
    with patch_environment(omp_num_threads=recipe.machine.threads):  # else accelerate chooses the number
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision={"fp32": "no"}.get(recipe.machine.precision, recipe.machine.precision),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if accelerator.num_processes != group.world():
        raise GroupError(
            f"{group.world()} processes were asked for (WORLD_SIZE), accelerate made {accelerator.num_processes}: "
            "launch with torchrun, or with `accelerate launch --multi_gpu`"
        )
    with council.together():
        _refuse_uneven(recipe)
    return accelerator, council, recipe


def repeat_bits() -> None:
    """Take those of CUDA's kernels only that add in the same order each time: attention's usual one on the way back,
    for one, adds as its threads come by."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":  # the only other one that does
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _refuse_uneven(recipe: Recipe) -> None:
    """RecipeError where a step's windows cannot be dealt to the processes in micro-batches of one size."""
    windows, world = recipe.windows_per_step, group.world()
    if windows % world:
        raise RecipeError(
            f"{windows} windows a step (train.tokens_per_step / model.context) cannot be shared by {world} processes: "
            f"make train.tokens_per_step a multiple of {world * recipe.model.context}"
        )
    micro_batch, share = recipe.machine.micro_batch, windows // world
    if recipe.machine.exact and isinstance(micro_batch, int):
        count = windows // micro_batch
        if count & (count - 1) or world & (world - 1):
            raise RecipeError(
                f"machine.exact sums a balanced tree over {count} micro-batches on {world} processes: both must be "
                "powers of two; choose train.tokens_per_step and machine.micro_batch so"
            )
    if isinstance(micro_batch, int) and share % micro_batch:
        nearest = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
        raise RecipeError(
            f"{windows} windows a step (train.tokens_per_step / model.context) cannot be split into micro-batches of "
            f"machine.micro_batch = {micro_batch} on {world} processes: try {nearest}"
        )


def die_with_parent() -> None:
    """Ask to be told (SIGTERM) when the launcher dies, which would otherwise leave an orphan. Linux only.

    Without a launcher the parent is a shell, which a person may close while the run goes on.
    """
    launched = "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def remember(recipe: Recipe, run: Path) -> None:
    """Keep what `settled` and a rehearsal found, for the next start of this run."""
    machine = recipe.machine
    found = {name: getattr(machine, name) for name in ("precision", "micro_batch", "threads")}
    store.write_sealed(run / RECORD, {**found, "world": group.world()})
