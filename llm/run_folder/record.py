"""Reads what a run recorded, without torch and without a checkpoint: metrics.jsonl, its recipe and its status.

The run may still be going, killed, of an earlier version or damaged: a field that is missing or of another type is left
out, and no more than the folder itself has to be there.
"""

import difflib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import LLMError, RecipeError, reason
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.model import cost
from llm.optim.time_budget import RECORD as PLAN

METRICS = "metrics.jsonl"
FILES = (METRICS, "recipe.yaml", "status.json")
TRAIN_ONE = "train one with `python launch/train.py recipes/quickstart.yaml`"
ENDINGS = {0: "finished", 2: "refused", 3: "diverged", 4: "refused", 5: "disk failed", 6: "group failed", 75: "stopped",
           130: "interrupted"}  # fmt: skip
TEXTS = ("prompt", "sample", "event", "device", "precision")
LISTED = 10  # runs that an error names
LEAST, MOST = 1e-30, 1e30  # numbers beyond these are none of a training


@dataclass(frozen=True)
class Record:
    """A run as it recorded itself. `faults` says in a line each what could not be read."""

    folder: Path
    lines: list[dict[str, Any]]
    recipe: Recipe | None
    status: dict[str, Any]
    faults: list[str]

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """One line for each start of the run; the first holds the plan. Empty in runs of earlier versions."""
        return [line for line in self.lines if "planned_steps" in line]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of logged steps, by step."""
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "val_loss" in line and "bits_per_byte" in line]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "sample" in line and "prompt" in line]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "event" in line]

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the fewest bits per byte, but for that of the weights that the run began with."""
        first = self.recipe.from_step if self.recipe else self.starts[0]["step"] if self.starts else 0
        after = (line for line in self.evaluations if line["step"] > first)
        return min(after, key=lambda line: line["bits_per_byte"], default=None)

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    def fact(self, name: str) -> Any:
        """A fact of the run's last start, such as `device`; None where it was not recorded."""
        return next((line[name] for line in reversed(self.starts) if name in line), None)

    @property
    def planned_steps(self) -> int | None:
        """Updates of the whole run; under train.hours as planned last."""
        if self.recipe and self.recipe.train.hours and (steps := _last_plan(self.folder / PLAN)):
            return steps
        if (steps := self.fact("planned_steps")) is not None:
            return int(steps)
        return self.recipe.train.steps or None if self.recipe else None

    @property
    def tokens_per_step(self) -> float | None:
        recorded = self.fact("tokens_per_step") or 0
        return recorded if recorded > 0 else self.recipe.train.tokens_per_step if self.recipe else None

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per byte of a training loss of 1 nat a token; of the validation side where none was recorded."""
        if (bytes_per_token := self.fact("bytes_per_token") or 0) > LEAST:
            return float(1 / bytes_per_token / math.log(2))
        ratios = [line["bits_per_byte"] / line["val_loss"] for line in self.evaluations if line["val_loss"] > LEAST]
        return ratios[-1] if ratios else None

    @property
    def parameters(self) -> int | None:
        if (recorded := self.fact("parameters")) is not None:
            return int(recorded)
        try:
            pieces = (self.folder / "tokenizer" / "tokenizer.vocab").read_bytes().count(b"\n")
        except OSError:
            named = self.recipe.tokenizer.vocabulary if self.recipe else 0
            pieces = 0 if named == "auto" else named
        return cost.parameters(self.recipe.model, pieces) if self.recipe else None

    @property
    def text(self) -> str:
        """The names of its texts, without their folders."""
        return ", ".join(map(short_name, self.recipe.text.names if self.recipe else ()))

    @property
    def state(self) -> str:
        """In a word or two; "running" where the process that trains it is alive on this machine."""
        status = self.status.get("status", "unknown")
        if status is not None:
            return ENDINGS.get(status, "failed") if isinstance(status, int) else "unknown"
        process = self.status.get("process")
        return "running" if isinstance(process, int) and _is_alive(process) else "killed"

    @property
    def changed(self) -> float:
        """When the record, or else the folder, last changed: seconds since the epoch."""
        paths = (self.folder / METRICS, self.folder)
        return next((path.stat().st_mtime for path in paths if path.exists()), 0.0)


def _last_plan(path: Path) -> int | None:
    try:
        steps = atomic_io.read_checksummed(path)["plan"][-1][1]
    except (LLMError, OSError, LookupError, TypeError):  # the record has the plans of its starts
        return None
    return steps if type(steps) is int and 0 < steps < MOST else None


def short_name(text: str) -> str:
    """The name of a text; of a path only the file's name, as folders describe the machine."""
    return text if text.startswith("hub:") else Path(text).name


def read(folder: Path) -> Record:
    """The record of the run in `folder`. Damage is told in `faults`, not raised."""
    faults: list[str] = []
    lines: list[dict[str, Any]] = []
    recipe, status = None, {}
    try:
        lines = list(_clean(folder / METRICS)) if (folder / METRICS).exists() else []
    except OSError as error:
        faults.append(reason(error))
    if (folder / "recipe.yaml").exists():
        try:
            recipe = load(folder / "recipe.yaml")
        except (LLMError, OSError, ValueError) as error:
            faults.append(reason(error))
    if (folder / "status.json").exists():
        try:
            found = atomic_io.read_json(folder / "status.json", most_bytes=1 << 20)
            status = found if isinstance(found, dict) else {}
        except (LLMError, OSError) as error:
            faults.append(reason(error))
    return Record(folder, lines, recipe, status, faults)


def is_run(folder: Path) -> bool:
    """Whether `folder` holds what a run records."""
    return any((folder / name).is_file() for name in FILES)


def find(name: str | None, runs: Path = Path("runs")) -> Path:
    """The folder of a run under `runs`, or at a path, with or without checkpoints. RecipeError if there is none.

    None means the run that recorded last.
    """
    if name is None:
        recorded = [each for each in runs.glob("*") if is_run(each)]
        if not recorded:
            raise RecipeError(f"there is no run under {runs}/ here: {TRAIN_ONE}")
        return max(recorded, key=lambda run: max(each.stat().st_mtime for each in run.iterdir() if each.name in FILES))
    for folder in (runs / name, Path(name)):
        if os.path.isdir(folder) and is_run(folder):  # noqa: PTH112  # pathlib raises where a name is too long
            return folder
    raise no_such_run(name, runs, [each.name for each in runs.glob("*") if is_run(each)])


def no_such_run(name: str, runs: Path, known: list[str]) -> RecipeError:
    """The error for a run that is not among those `known` under `runs`."""
    near = [found for part in Path(name).parts for found in difflib.get_close_matches(part, known, 1, 0.75)]
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    mend = f"there are {', '.join(sorted(known)[:LISTED])}{more}" if known else "there is none yet"
    return RecipeError(
        f"there is no run {name[:100]!r} under {runs}/ here: {f'did you mean {near[0]}?' if near else mend}"
    )


def _clean(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, of each only the fields that have their type: numbers finite, texts texts.

    `sources` is the bits per byte of each source of a mixture.
    """
    for line in atomic_io.read_lines(path):
        step = line.pop("step", None)
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1e15:
            continue
        kept = {name: value for name, value in line.items() if _has_type(name, value)}
        if isinstance(texts := line.get("texts"), list):
            kept["texts"] = [each for each in texts if isinstance(each, str)]
        if isinstance(sources := line.get("sources"), dict):
            bits = {name: each.get("bits_per_byte") for name, each in sources.items() if isinstance(each, dict)}
            kept["sources"] = {name: value for name, value in bits.items() if _is_number(value)}
        yield {"step": step, **kept}


def _has_type(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    return isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST  # false for NaN


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return process > 0
