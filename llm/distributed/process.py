"""Rank and world size of this process, and output that is printed once for all ranks."""

import os
import re
import sys
from dataclasses import dataclass

from llm.base.errors import GroupError, tell

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # set by torchrun and accelerate
OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # others' WORLD_SIZE


@dataclass(frozen=True)
class Place:
    """Position of this process among all ranks and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def place() -> Place:
    """Read this process's place from the launcher's variables. GroupError if they contradict each other."""
    said = {name: value for name in (*COUNTS, *OTHERS) if (value := os.environ.get(name, "").strip())}
    mend = f"launch with torchrun or accelerate launch; for one process alone, unset {', '.join(COUNTS[:4])}"
    if "WORLD_SIZE" not in said:
        if stray := next((name for name in said if name in COUNTS[:4]), None):
            raise GroupError(f"{stray} = {said[stray]} is in the environment without WORLD_SIZE: {mend}")
        if other := next((name for name in OTHERS if said.get(name, "1") != "1"), None):
            start = "launch with torchrun or by launch/slurm.sh; for processes that train alone, set WORLD_SIZE=1"
            raise GroupError(f"{other} = {said[other]} is in the environment without RANK and WORLD_SIZE: {start}")
        return Place()
    for name in COUNTS:
        if not re.fullmatch("[0-9]{1,9}", said.get(name, "0")):
            raise GroupError(f"{name} = {said[name]} in the environment is not a number: {mend}")
    here = Place(*(int(said.get(name, default)) for name, default in zip(COUNTS[:4], "0101", strict=True)))
    if here.world != 1 and (missing := [name for name in (*COUNTS, "MASTER_ADDR") if not os.environ.get(name)]):
        raise GroupError(f"WORLD_SIZE = {here.world} is in the environment without {', '.join(missing)}: {mend}")
    if not (here.rank < here.world and here.local_rank < here.local_world <= here.world):
        values = ", ".join(f"{name} = {said.get(name, 'not set')}" for name in COUNTS[:4])
        raise GroupError(f"{values} in the environment contradict each other: {mend}")
    return here


def rank() -> int:
    return place().rank


def world() -> int:
    return place().world


def say(text: str) -> None:
    """Print on the main process only."""
    if rank() == 0:
        tell(text, sys.stdout)


def warn(text: str) -> None:
    """Print a line on stderr, with the rank if there are several."""
    tell(f"process {rank()}: {text}" if world() > 1 else text, sys.stderr)
