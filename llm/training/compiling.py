"""Resolves machine.compile = auto before the first step, alike on all ranks.

The model's shape, the run's length and a trial of the compiler decide. Nothing is timed, so the choice is repeatable.
"""

from dataclasses import replace

import torch

from llm.config.schema import Recipe
from llm.distributed import process
from llm.distributed.coordinator import Coordinator
from llm.distributed.environment import DTYPES, RuntimeSettings
from llm.model import cost

# By device: seconds that compiling takes at most, without the compiler's cache; operations a second of a thread or a
# card that runs uncompiled; the share of the time that compiling saves in 32 and 16 bits (tests/benchmarks/README.md).
COMPILING = {"cpu": (60.0, 7e10, {4: 0.04, 2: 0.15}), "cuda": (30.0, 2e13, {4: 0.3, 2: 0.35})}


def pays(recipe: Recipe, vocab_size: int, *, device: str, number: int, workers: int) -> bool:
    """Whether compiling saves a run, whose length in steps or hours is known, more time than it takes.

    `number`: bytes of a number in the products; `workers`: threads, or cards, of all processes together.
    """
    if device not in COMPILING:
        return False
    (taken, rate, saved), train = COMPILING[device], recipe.train
    flops = cost.run_flops(recipe.model, train, vocab_size)
    return (3600 * train.hours or flops / (rate * workers)) * saved[number] > taken


def with_compile(
    settings: RuntimeSettings, recipe: Recipe, vocab_size: int, device: torch.device, coordinator: Coordinator
) -> RuntimeSettings:
    """`settings` with `compile` decided, the same on every rank."""
    if settings.compile is not None:
        return settings
    workers = (settings.threads if device.type == "cpu" else 1) * process.world()
    number = DTYPES[settings.precision].itemsize
    mine = process.rank() == 0 and pays(recipe, vocab_size, device=device.type, number=number, workers=workers)
    wanted = coordinator.largest(int(mine)) == 1
    if wanted and coordinator.largest(int(not works(device))):
        process.say("machine.compile = auto: no compiler works here, going on without")
        wanted = False
    return replace(settings, compile=wanted)


def works(device: torch.device) -> bool:
    """Whether a kernel can be compiled for this device: compiles a small one."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        torch.compile(_small)(torch.ones(64, device=device))
    except TorchDynamoException:
        return False
    finally:
        torch._dynamo.reset()
    return True


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).relu() * x
