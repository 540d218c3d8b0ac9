"""Opens a run: finds its folder and a checkpoint, and loads recipe, tokenizer and model."""

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm.base.errors import RecipeError, RefusedError
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.data import hf_tokenizer
from llm.data.tokenizer import Tokenizer
from llm.distributed import threads
from llm.distributed.process import warn
from llm.distributed.sharding import local_shard
from llm.model import hf_config
from llm.model.transformer import Transformer
from llm.run_folder import checkpoint, tensor_files
from llm.run_folder.checkpoint import Checkpoint
from llm.run_folder.record import TRAIN_ONE, no_such_run

RUNS = Path("runs")
RELATED = 0.05  # cosine of weights; measured: branches 0.46 after a quarter of the run, unrelated runs below 0.01


@dataclass(frozen=True)
class LoadedRun:
    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    model: Transformer
    checkpoint: Checkpoint
    others: tuple[str, ...] = ()  # whose weights are in the mean that `model` has

    @property
    def name(self) -> str:
        own = f"{self.folder.name}/{self.checkpoint.folder.name}"
        return f"the mean of {', '.join([own, *self.others])}" if self.others else own

    @property
    def is_chat(self) -> bool:
        """True if it was trained on conversations."""
        return self.checkpoint.manifest.get("chat") is True


def find(name: str | None, runs: Path = RUNS) -> tuple[Path, str]:
    """The folder of a run, and the checkpoint asked for: "best" unless `name` ends in /step-N or /newest.

    `name` is a run under `runs` or a path; None means the run trained last. RecipeError where there is no such run.
    """
    if name is None:
        written = {path: _written(path) for path in runs.glob("*") if checkpoint.folders(path)}
        if not written:
            raise RecipeError(f"there is no trained run under {runs}/ here: {TRAIN_ONE}")
        return max(written, key=written.__getitem__), "best"
    path, which = Path(name), "best"
    if path.name in ("best", "newest") or path.name.startswith("step-"):
        path, which = path.parent, path.name
    if path.name == "checkpoints":
        path = path.parent
    for folder in (runs / path, path) if name else ():
        if os.path.isdir(folder):  # noqa: PTH112  # pathlib raises where a name is too long
            if not checkpoint.folders(folder):
                raise RecipeError(f"{folder} has no checkpoint yet")
            return (folder if folder.name not in ("", "..") else folder.resolve()), which  # "." and ".." are no names
    raise no_such_run(name, runs, [each.name for each in runs.glob("*") if checkpoint.folders(each)])


def _written(run: Path) -> float:
    """When the last checkpoint of a run was written. A training run may remove any of them meanwhile."""
    times = [0.0]
    for folder in checkpoint.folders(run):
        with suppress(FileNotFoundError):
            times.append(folder.stat().st_mtime)
    return max(times)


def open_run(name: str | None, device: torch.device | None = None, runs: Path = RUNS, model: Any = None) -> LoadedRun:
    """Recipe, tokenizer and model of a run (see `find`), its files verified. RefusedError names a damaged file.

    `model` makes the model, where it is not Transformer (see api.train).
    """
    folder, which = find(name, runs)
    threads.use_threads(min(torch.get_num_threads(), threads.threads_per_process()))  # torch heeds no quota
    while True:
        there = set(checkpoint.folders(folder))
        try:
            return _open(folder, which, device, model)
        except (RecipeError, RefusedError, FileNotFoundError):
            if there <= set(checkpoint.folders(folder)):
                raise  # otherwise training has replaced the checkpoint being read by a newer one


@torch.no_grad()
def open_mean(name: str | None, others: Sequence[str], device: torch.device | None = None) -> LoadedRun:
    """A run whose weights are the mean of its own and those of `others`; of its own alone if there are none.

    It is better than each of them if they went on from one checkpoint, with other seeds; a run that seems to have begun
    by itself gets a warning. RefusedError where a run has another shape or other pieces.
    """
    first = open_run(name, device)
    if not others:
        return first
    sums = {key: p.cpu().double() for key, p in first.model.named_parameters()}  # Apple's GPUs have no fp64
    names, folders = [], {first.checkpoint.folder.resolve()}
    for each in others:
        other = open_run(each, torch.device("cpu"))
        if (folder := other.checkpoint.folder.resolve()) in folders:
            raise RecipeError(f"--mean {each}: {other.name} is in the mean already: name another run")
        folders.add(folder)
        added = dict(other.model.named_parameters())
        alike = {key: p.shape for key, p in added.items()} == {key: total.shape for key, total in sums.items()}
        alike = alike and other.model.family == first.model.family
        if not alike or other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            mend = "name runs that went on from one checkpoint"
            raise RefusedError(f"{other.name} has another shape or other pieces than {first.name}: {mend}")
        cosines = [
            float(torch.cosine_similarity(p.flatten().cpu().double(), added[key].flatten().double(), dim=0))
            for key, p in first.model.named_parameters()
            if p.ndim == 2
        ]
        if statistics.median(cosines) < RELATED:
            fault = f"{other.name} and {first.name} have not gone on from one checkpoint"
            warn(f"{fault}: the mean of their weights is likely worse than either")
        for key, total in sums.items():
            total += added[key]
        names.append(other.name)
    for key, p in first.model.named_parameters():
        p.copy_(sums[key] / (1 + len(names)))
    return replace(first, others=tuple(names))


def _open(folder: Path, which: str, device: torch.device | None, new_model: Any) -> LoadedRun:
    found = None
    if which == "best" and (best := checkpoint.best(folder, warn=warn)) is not None:
        try:
            found = checkpoint.open_checkpoint(best.folder)
        except RefusedError as error:
            warn(f"{error}; the newest is taken instead of the best")
    elif which.startswith("step-"):
        path = checkpoint.folder_of(folder, checkpoint.step_of(which))
        if not path.is_dir():
            there = ", ".join(each.name for each in checkpoint.folders(folder))
            raise RecipeError(f"{folder} has no checkpoint {which}: there are {there}")
        found = checkpoint.open_checkpoint(path)
    found = found or checkpoint.newest(folder, warn)
    assert found is not None
    recipe = load(folder / "recipe.yaml")
    tokenizer = hf_tokenizer.load(folder / "tokenizer")
    if tokenizer.fingerprint != found.manifest["tokenizer"]:
        with_it = f"that {found.folder.name} was trained with"
        raise RefusedError(f"{folder / 'tokenizer'} is not the tokenizer {with_it}, or is damaged")
    own = found.manifest.get("parts", {}).get("model")
    if own and new_model is None:
        mend = f"open it in Python by llm.open_run({folder.name!r}, model=...)"
        raise RefusedError(f"{folder} was trained with a model of its own, {own}: {mend}")
    family = hf_config.family_of(recipe) if own else hf_config.read_family(found.folder)
    model = (new_model or Transformer)(recipe.model, tokenizer.vocab_size, recipe.seed, family=family)
    weights = {name: local_shard(p) for name, p in model.named_parameters()}
    tensor_files.load_tensors(found.folder / checkpoint.WEIGHTS, weights)
    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return LoadedRun(folder, recipe, tokenizer, model.to(device or fastest).eval(), found)
