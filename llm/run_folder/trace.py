"""The trace: a record of a run by which two runs are compared, to the first step at which they diverge.

fingerprints.jsonl has one line each `tracking.every` steps: the windows read since the line before, the loss to the
last bit, a checksum of all weights, and a digest that chains the line to all before it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.base.hashing import mix
from llm.config.reading import load
from llm.config.schema import flat, said
from llm.data.mixture import Order
from llm.distributed.process import warn
from llm.distributed.sharding import LocalShard, Sharding, gather

FILE = "fingerprints.jsonl"
VALUES = {"step", "windows", "loss", "weights", "chain"}  # of each line
ODD = -7046029254386353131  # 0x9E3779B97F4A7C15: the golden ratio spreads a row's number over 64 bits


def checksum(weights: dict[str, LocalShard], sharding: Sharding) -> Tensor:
    """A checksum of each tensor, in the order of their names: int64, on the device. One changed bit changes it.

    Sums wrap around, and do not depend on how rows are sharded.
    """
    sums = []
    for _, shard in sorted(weights.items()):
        local = shard.flat
        row_sums = local.view(torch.int32).sum(1, dtype=torch.int64)
        numbers = torch.arange(shard.low, shard.low + len(local), device=local.device) * 2 + 1
        sums.append((row_sums * (numbers * ODD)).sum())
    total = torch.stack(sums)
    return gather(total, sharding.shard_group).sum(0) if sharding.sharded else total


def windows(order: Order, positions: np.ndarray) -> str:
    """Digest of the windows at `positions`."""
    return f"{mix(*order.starts(positions).tolist()):016x}"


class Trace(atomic_io.Lines):
    """Writes the trace of a run that continues after `step`; later and damaged lines are removed.

    `begin` is the step that the whole run began after: its first line tells of the windows from there on. A line counts
    as damaged, too, where it does not follow from the one before it; those that are left are chained anew.
    """

    def __init__(self, run: Path, step: int, begin: int = 0) -> None:
        self.chain, self.step = "", begin
        before: Any = ""
        dropped = 0

        def keep(line: dict[str, Any]) -> bool:
            nonlocal before, dropped
            if not (follows := _is_whole(line) and _link(before, line["step"], _values(line)) == line["chain"]):
                dropped += 1
            before = str(line.get("chain"))
            if not follows or line["step"] > step:
                return False
            self.chain = line["chain"] = _link(self.chain, line["step"], _values(line))
            self.step = line["step"]
            return True

        super().__init__(run / FILE, keep=keep)
        if dropped := dropped + self.invalid:
            warn(f"{run / FILE} was damaged: {dropped} of its lines are left out")

    def add(self, step: int, **values: Any) -> None:
        self.chain = _link(self.chain, step, values)
        self.append({"step": step, **values, "chain": self.chain})
        self.step = step


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's trace; none where it keeps no trace. RefusedError where one is damaged."""
    lines = list(atomic_io.read_lines(run / FILE)) if (run / FILE).exists() else []
    if not all(map(_is_whole, lines)):
        raise RefusedError(
            f"{run / FILE} is damaged, as a line lacks a value, or has one of another type: restore it, or remove it"
        )
    return lines


def verify_chain(run: Path) -> int:
    """The number of lines in the trace. RefusedError names the first that does not follow from those before it."""
    chain = ""
    lines = read(run)
    for line in lines:
        chain = _link(chain, line["step"], _values(line))
        if chain != line["chain"]:
            raise RefusedError(f"{run / FILE}: the line of step {line['step']} does not follow from those before it")
    return len(lines)


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line has its values, each of its type."""
    try:
        float.fromhex(line["loss"])
        atomic_io.digest_of(line)  # refuses NaN
        return type(line["step"]) is int and all(isinstance(line[name], str) for name in VALUES - {"step"})
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _values(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("step", "chain")}


def _link(chain: str, step: int, values: dict[str, Any]) -> str:
    return atomic_io.digest_of([chain, step, values])[:32]


def compare_runs(a: Path, b: Path) -> list[str]:
    """Lines that name the keys in which two runs' recipes differ, and the first step at which their traces do."""
    loaded = [load(folder / "recipe.yaml") for folder in (a, b)]
    recipes = [flat(recipe) for recipe in loaded]
    values = {name: [recipe.get(name) for recipe in recipes] for name in {**recipes[0], **recipes[1]}}
    lines = [f"{name}: {said(ours)} | {said(theirs)}" for name, (ours, theirs) in values.items() if ours != theirs]
    traces = [{line["step"]: line for line in read(folder)} for folder in (a, b)]
    starts = [
        dict(zip(each, [recipe.from_step, *each], strict=False)) for each, recipe in zip(traces, loaded, strict=True)
    ]
    common = sorted(traces[0].keys() & traces[1].keys())
    if not common:
        return [*lines, f"{a.name} and {b.name} have no step in common in their records"]
    for before, step in zip([None, *common], common, strict=False):
        alike = starts[0][step] == starts[1][step]  # else the two lines tell of the windows of other steps
        if difference := first_difference(traces[0][step], traces[1][step], windows=alike):
            since = f"they agree up to step {before}" if before is not None else "no earlier step is in both records"
            return [*lines, f"{a.name} and {b.name} part at step {step}: {difference}; {since}"]
    steps = f"all {len(common)} common steps" if len(common) > 1 else "the one common step"
    last = f"{steps} of their records, up to step {common[-1]}"
    return [*lines, f"{a.name} and {b.name} agree to the bit in {last}"]


def first_difference(a: dict[str, Any], b: dict[str, Any], *, windows: bool = True) -> str:
    """The first difference between two lines of the trace: windows, loss or weights; empty where there is none.

    Without `windows` these are left out, as the lines tell of those of other steps.
    """
    if windows and a["windows"] != b["windows"]:
        return "they read other windows"
    if a["loss"] != b["loss"]:
        losses = [float.fromhex(line["loss"]) for line in (a, b)]
        on_the_same = " on the same windows" if windows else ""
        return f"their losses are {losses[0]:.6f} and {losses[1]:.6f}{on_the_same}"
    if a["weights"] != b["weights"]:
        return "same windows, same loss, other weights" if windows else "same loss, other weights"
    return ""
