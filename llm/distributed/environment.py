"""The machine half of a recipe met with this machine: processes, device, and what every `auto` comes to.

Precision, threads and micro-batch are part of what decides a run's bits, so what was found once is kept in the run.
"""

import ctypes
import getpass
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, patch_environment

from llm import __version__
from llm.base import atomic_io
from llm.base.errors import GroupError, RecipeError, RefusedError
from llm.config.recipe import Recipe, flat
from llm.distributed import coordinator, environment, process, threads

CPU_TOKENS = 2048  # of a micro-batch on a CPU: more are no faster there
EXACT_MICRO_BATCHES = (8, 4, 2)  # of a step, where machine.exact chooses: as many processes can share them
RECORD = "machine.json"
# What an accelerate configuration may ask for, the value that asks for nothing, and what decides it here.
DECIDED = {
    "MIXED_PRECISION": ("no", "machine.precision"),
    "DYNAMO_BACKEND": ("no", "machine.compile"),
    "GRADIENT_ACCUMULATION_STEPS": ("1", "machine.micro_batch"),
    "GRADIENT_CLIPPING": ("none", "train.clip"),
    "TORCH_DEVICE": ("", "CUDA_VISIBLE_DEVICES"),
    "USE_DEEPSPEED": ("false", "machine.shard"),
    "USE_MEGATRON_LM": ("false", "machine.shard"),
    "USE_PARALLELISM_CONFIG": ("false", "machine.shard"),
}
KEPT = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")


def threads_of(recipe: Recipe, known: dict[str, Any]) -> int:
    """CPU threads of this process: as the recipe says, else its share of the machine's cores."""
    if recipe.machine.threads != "auto":
        return recipe.machine.threads
    if recipe.machine.exact and "threads" in known:  # part of what decides the bits
        return int(known["threads"])
    return threads.threads_per_process()


def parents_line() -> list[str]:
    """The words of the command line of the process that started this one; none where they cannot be seen (Linux)."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def is_accelerate(line: list[str]) -> bool:
    launchers = ("accelerate", "accelerate-launch")
    return any(Path(word).name in launchers or "accelerate.commands" in word for word in line)


def asked_for() -> int | None:
    """How many processes the `accelerate launch` above this process was asked for, where that can be seen (Linux)."""
    line = parents_line()
    if not is_accelerate(line):
        return None
    options = " ".join(line[: line.index(sys.argv[0])] if sys.argv[0] in line else line)
    if found := re.search(r"--num[_-]processes[ =]+(\d+)", options):
        return int(found[1])
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = re.search(r"--config[_-]file[ =]+(\S+)", options)
    config = Path(os.path.expanduser(named[1] if named else f"{home}/accelerate/default_config.yaml"))  # noqa: PTH111
    if not config.is_file() or ("--cpu" in options and not named):  # then accelerate reads no default
        return None
    found = re.search(r"(?m)^num_processes: *(\d+)", config.read_text(errors="replace"))
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
    gain = environment.measured_flops(device, torch.bfloat16) / environment.measured_flops(device, torch.float32)
    return "bf16" if gain > 1.3 else "fp32"


def resolve_auto(recipe: Recipe, run: Path, council: coordinator.Coordinator) -> Recipe:
    """The recipe with every `auto` of its machine half settled, but for the micro-batch of an accelerator.

    What the run settled before stays. The first process decides for all.
    """
    record = run / RECORD
    try:
        known = atomic_io.read_checksummed(record) if record.exists() else {}
    except RefusedError as error:
        raise RefusedError(
            f"{error}: remove it, and the precision, micro-batch and threads that are auto are chosen anew; "
            "checkpoints/*/checkpoint.json hold those that decided the bits"
        ) from error
    torch.set_num_threads(threads_of(recipe, known))
    threads.yield_to_neighbours()
    names: tuple[Any, ...] = ("fp32", "bf16", "fp16")
    precision = known.get("precision") if recipe.machine.precision == "auto" else None
    precision = names[council.largest(names.index(precision or precision_of(recipe)) if process.rank() == 0 else 0)]
    micro_batch: Any = recipe.machine.micro_batch
    if micro_batch == "auto":
        share = recipe.windows_per_step // process.world()
        fitting = [
            n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * recipe.model.context <= CPU_TOKENS)
        ]
        if recipe.machine.exact:  # part of what decides the bits, so it must not depend on the world
            windows = recipe.windows_per_step
            fitting = [n for n in range(1, windows + 1) if windows % n == 0 and windows // n in EXACT_MICRO_BATCHES]
            fitting = fitting[:1] or [1]
        kept = known.get("world") == process.world() or recipe.machine.exact
        micro_batch = council.largest(known.get("micro_batch", 0) if kept and process.rank() == 0 else 0)
        micro_batch = micro_batch or (max(fitting, default=1) if not has_accelerator() else "auto")
    return replace(
        recipe,
        machine=replace(recipe.machine, precision=precision, micro_batch=micro_batch, threads=torch.get_num_threads()),
    )


def start_group(recipe: Recipe) -> tuple[Accelerator, coordinator.Coordinator, Recipe]:
    """The processes, met and counted. GroupError where they are not those that were asked for."""
    on_cpu, world = not has_accelerator(), process.world()  # refused before all else where the launch is half a one
    asked = asked_for()
    if asked is not None and asked != world:
        raise GroupError(
            f"{asked} processes were asked for, but this launch line starts {world}: say "
            f"`accelerate launch --multi_gpu --num_processes {asked}`, without --cpu on a machine without GPUs too, or "
            f"`torchrun --nproc_per_node {asked}`"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and recipe.machine.shard == "none":
        process.say("the accelerate configuration asks for FSDP: machine.shard = full")
        recipe = replace(recipe, machine=replace(recipe.machine, shard="full"))
    _leave_to_recipe(on_cpu)
    if recipe.machine.compile:
        try:
            getpass.getuser()  # the compiler names its cache after the user
        except (OSError, KeyError):
            os.environ["USER"] = str(os.getuid())
    if torch.cuda.is_available():
        use_deterministic_kernels()
    if process.world() > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(process.place().local_rank)
        try:
            torch.distributed.init_process_group("gloo" if on_cpu else "nccl", timeout=coordinator.HUNG)
        except (RuntimeError, ValueError) as error:
            where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise GroupError(
                f"the {process.world()} processes did not meet at {where} (MASTER_ADDR, MASTER_PORT): start all of "
                f"them, with a free port of the first one's machine ({str(error).splitlines()[0][:160]})"
            ) from None
    council = coordinator.Coordinator()
    run = Path("runs") / recipe.run
    with council.error_barrier():
        versions = {"torch": torch.__version__, "accelerate": accelerate.__version__, "onetext-llm": __version__}
        council.agree("versions", versions, "install the same version everywhere")
        same = {name: value for name, value in flat(recipe).items() if name != "text.cache"}  # may be a disk of its own
        if recipe.machine.shard == "hybrid":
            same["LOCAL_WORLD_SIZE"] = process.place().local_world
        council.agree("recipe", same, "start every process with the same recipe and overrides")
        recipe = resolve_auto(recipe, run, council)
    with patch_environment(omp_num_threads=recipe.machine.threads):  # else accelerate chooses the number
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision={"fp32": "no"}.get(recipe.machine.precision, recipe.machine.precision),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if accelerator.num_processes != process.world():
        raise GroupError(
            f"{process.world()} processes were asked for (WORLD_SIZE), accelerate made {accelerator.num_processes}: "
            "launch with torchrun, or with `accelerate launch --multi_gpu`"
        )
    with council.error_barrier():
        _refuse_uneven(recipe)
    return accelerator, council, recipe


@contextmanager
def as_it_was() -> Iterator[None]:
    """Leave the process as it was found: variables, signal handlers, threads, modes of torch, Accelerate's state."""
    states = (PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state)
    environment, theirs = dict(os.environ), [dict(state) for state in states]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads, strict = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    for state in states:  # of another precision, maybe, which Accelerate would not change
        state.clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for state, kept in zip(states, theirs, strict=True):
            state.clear()
            state.update(kept)
        for name in os.environ.keys() | environment.keys():
            if name not in environment:
                del os.environ[name]
            elif os.environ.get(name) != environment[name]:
                os.environ[name] = environment[name]
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(strict)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _leave_to_recipe(on_cpu: bool) -> None:
    """Let Accelerate hear from its environment no more than the place of this process: the recipe decides the rest.

    Says which of a configuration's wishes are not taken.
    """
    for name, (nothing, key) in DECIDED.items():
        if (value := os.environ.get(f"ACCELERATE_{name}", nothing).lower()) != nothing:
            process.say(f"the accelerate configuration says {name.lower()} = {value}: not taken, {key} decides")
    if not on_cpu and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        raise GroupError("the accelerate configuration says use_cpu: set CUDA_VISIBLE_DEVICES= to train on the CPU")
    foreign = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "PMI_", "OMPI_", "MV2_")
    for name in [name for name in os.environ if name.startswith(foreign) and name not in KEPT]:
        del os.environ[name]
    if process.world() == 1:  # accelerate would make a group of LOCAL_RANK alone
        for name in process.COUNTS:
            os.environ.pop(name, None)
        os.environ["WORLD_SIZE"] = "1"
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def use_deterministic_kernels() -> None:
    """Take those of CUDA's kernels only that add in the same order each time: attention's usual one on the way back,
    for one, adds as its threads come by."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":  # the only other one that does
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _refuse_uneven(recipe: Recipe) -> None:
    """RecipeError where a step's windows cannot be dealt to the processes in micro-batches of one size."""
    windows, world = recipe.windows_per_step, process.world()
    if windows % world:
        raise RecipeError(
            f"{windows} windows a step (train.tokens_per_step / model.context) cannot be shared by {world} processes: "
            f"make train.tokens_per_step a multiple of {world * recipe.model.context}"
        )
    if recipe.machine.shard == "hybrid" and world % (local := process.place().local_world):
        raise RecipeError(
            f"machine.shard = hybrid needs as many processes on each machine: {world} in all, {local} on this one"
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

    Any other parent is a shell or a script, which may end while the run goes on, whatever it has exported.
    """
    line = parents_line()
    others = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "llm.verify")
    launched = is_accelerate(line) or any(Path(word).name in others for word in line)
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def save_settings(recipe: Recipe, run: Path) -> None:
    """Keep what `settled` and a rehearsal found, for the next start of this run."""
    machine = recipe.machine
    found = {name: getattr(machine, name) for name in ("precision", "micro_batch", "threads")}
    atomic_io.write_checksummed(run / RECORD, {**found, "world": process.world()})


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 256, seconds: float = 0.1) -> float:
    """Operations a second of this machine's own product of two square matrices in `dtype`: the best of several."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
