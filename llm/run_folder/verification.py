"""Reads every file of a run again and compares it with what was recorded of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import LLMError, RefusedError
from llm.config.reading import load
from llm.data import hf_tokenizer
from llm.data.shards import of_run
from llm.optim import time_budget
from llm.run_folder import checkpoint, trace
from llm.run_folder.loaded_run import find


@dataclass(frozen=True)
class Verdict:
    """`fault` says where and how the promise was broken; it is empty where the promise was kept."""

    promise: str
    fault: str


def verify_run(name: str) -> list[Verdict]:
    """One verdict for each checkpoint of the run and for each of its other files."""
    folder, _ = find(name)
    fingerprints: set[str] = set()  # of the tokenizers that the checkpoints were trained with
    plan = folder / time_budget.RECORD

    def open_checkpoint(path: Path) -> None:
        fingerprints.add(checkpoint.open_checkpoint(path).manifest["tokenizer"])

    def check_tokenizer() -> None:
        if fingerprints - {hf_tokenizer.load(folder / "tokenizer").fingerprint}:
            raise RefusedError("it is not the one that the checkpoints were trained with")

    checks: list[tuple[str, Callable[[], Any]]] = [
        *((f"{path.name}: every file has its sha256; to be resumed from", lambda path=path: open_checkpoint(path))
          for path in checkpoint.folders(folder)),
        ("identity: it matches its own digest", lambda: checkpoint.identity(folder)),
        ("tokenizer: the checkpoints' own", check_tokenizer),
        ("shards: every file has its sha256", lambda: of_run(folder, verify=True)),
        ("fingerprints: an unbroken chain", lambda: trace.verify_chain(folder)),
        *([("plan: it matches its own digest", lambda: atomic_io.read_checksummed(plan))] if plan.exists() else []),
        ("recipe: reads and resolves", lambda: load(folder / "recipe.yaml")),
    ]  # fmt: skip
    return [Verdict(promise, _fault(check)) for promise, check in checks]


def _fault(check: Callable[[], Any]) -> str:
    try:
        check()
        return ""
    except (LLMError, OSError, KeyError, ValueError) as error:
        return " ".join(str(error).split())
