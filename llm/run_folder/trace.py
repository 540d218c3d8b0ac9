"""A rolling record of a run, by which two runs can be compared to the first step at which they part.

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
from llm.config.schema import flat
from llm.data.shuffle import WindowShuffle
from llm.distributed.sharding import LocalShard, Sharding, gather

FILE = "fingerprints.jsonl"
ODD = -7046029254386353131  # 0x9E3779B97F4A7C15: spreads a row's number over 64 bits


def checksum(weights: dict[str, LocalShard], sharding: Sharding) -> Tensor:
    """A number for each tensor, in the order of their names, that a changed bit changes: int64, on the device.

    Sums wrap and do not depend on how rows are dealt.
    """
    sums = []
    for _, rows in sorted(weights.items()):
        local = rows.flat
        row_sums = local.view(torch.int32).sum(1, dtype=torch.int64)
        numbers = torch.arange(rows.low, rows.low + len(local), device=local.device) * 2 + 1
        sums.append((row_sums * (numbers * ODD)).sum())
    total = torch.stack(sums)
    return gather(total, sharding.shard_group).sum(0) if sharding.sharded else total


def windows(order: WindowShuffle, positions: np.ndarray) -> str:
    """Digest of which windows stand at `positions`."""
    return f"{mix(*order.starts(positions).tolist()):016x}"


class Trace:
    """The record of a run that goes on after `step`."""

    def __init__(self, run: Path, step: int) -> None:
        self.lines = atomic_io.Lines(run / FILE, keep=lambda line: line.get("step", 0) <= step)
        last = list(read(run))[-1:]
        self.chain = str(last[0]["chain"]) if last else ""
        self.step = int(last[0]["step"]) if last else step

    def add(self, step: int, **values: Any) -> None:
        self.chain = _link(self.chain, step, values)
        self.lines.append({"step": step, **values, "chain": self.chain})
        self.step = step

    def flush(self) -> None:
        self.lines.flush()

    def close(self) -> None:
        self.lines.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's record; none where it keeps none."""
    return list(atomic_io.read_lines(run / FILE)) if (run / FILE).exists() else []


def verify_chain(run: Path) -> int:
    """How many lines the record has. RefusedError names the first that does not follow from those before it."""
    chain = ""
    lines = read(run)
    for line in lines:
        values = {name: value for name, value in line.items() if name not in ("step", "chain")}
        chain = _link(chain, line["step"], values)
        if chain != line["chain"]:
            raise RefusedError(f"{run / FILE}: the line of step {line['step']} does not follow from those before it")
    return len(lines)


def _link(chain: str, step: int, values: dict[str, Any]) -> str:
    return atomic_io.digest_of([chain, step, values])[:32]


def differences(a: Path, b: Path) -> list[str]:
    """Lines that say which keys of two runs' recipes differ, and from which step on the runs do."""
    recipes = [flat(load(folder / "recipe.yaml")) for folder in (a, b)]
    lines = [
        f"{name}: {recipes[0].get(name)} | {recipes[1].get(name)}"
        for name in recipes[0]
        if recipes[0].get(name) != recipes[1].get(name)
    ]
    records = [{line["step"]: line for line in read(folder)} for folder in (a, b)]
    common = sorted(records[0].keys() & records[1].keys())
    if not common:
        return [*lines, f"{a.name} and {b.name} have no step in common in their records"]
    for before, step in zip([None, *common], common, strict=False):
        what = parted(records[0][step], records[1][step])
        if what:
            since = f"they agree up to step {before}" if before is not None else "they never agreed"
            return [*lines, f"{a.name} and {b.name} part at step {step}: {what}; {since}"]
    last = f"all {len(common)} common steps of their records, up to step {common[-1]}"
    return [*lines, f"{a.name} and {b.name} agree to the bit in {last}"]


def parted(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What differs first between two lines of the record: windows, loss or weights; empty where nothing does."""
    if a["windows"] != b["windows"]:
        return "they read other windows"
    if a["loss"] != b["loss"]:
        losses = [float.fromhex(line["loss"]) for line in (a, b)]
        return f"their losses are {losses[0]:.6f} and {losses[1]:.6f} on the same windows"
    if a["weights"] != b["weights"]:
        return "same windows, same loss, other weights"
    return ""
