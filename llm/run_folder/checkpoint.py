"""Checkpoints: runs/NAME/checkpoints/step-000100/ with weights and moments as safetensors and a manifest; no pickle.

A folder under its final name is whole: it was filled under another name, flushed and renamed. The bytes of its files
follow from the tensors alone, so that equal digests mean equal weights and moments. Only what passes its sha256 is
loaded.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.base import atomic_io
from llm.base.errors import DiskError, LLMError, RefusedError
from llm.config.reading import load
from llm.config.resolving import counted_from_1
from llm.config.schema import STEP, science
from llm.distributed.coordinator import Coordinator
from llm.distributed.sharding import LocalShard, Sharding

FORMAT = 2  # of a manifest; in format 1 the science half's train.skip counted steps from 0
IDENTITY = "identity.json"  # in the run
MANIFEST = "checkpoint.json"
WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
SLACK = 64 << 10  # bytes of a manifest, and of what a file system keeps of each file
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def bits_per_byte(self) -> float | None:
        """Of the evaluation at this very step, where there was one."""
        return self.manifest["metrics"].get("bits_per_byte")

    @property
    def digest(self) -> str:
        """Digest of weights and moments."""
        return atomic_io.digest_of([self.manifest["files"][name]["sha256"] for name in (WEIGHTS, MOMENTS)])


class ForeignError(RefusedError):
    """A checkpoint that another run made."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(name: str) -> int:
    """The N of step-N, -1 where `name` is none."""
    match = re.fullmatch(STEP, name)
    return int(match[1]) if match else -1


def identity(run: Path) -> str | None:
    """What a run took from how it began, and each of its checkpoints bears; None where it has none.

    RefusedError where its file is damaged.
    """
    path = run / IDENTITY
    return str(atomic_io.read_checksummed(path).get("run")) if path.exists() else None


def save(
    folder: Path,
    *,
    weights: dict[str, LocalShard],
    moments: dict[str, LocalShard],
    manifest: dict[str, Any],
    beside: dict[str, bytes],
    loose: dict[str, bytes],
    council: Coordinator,
    sharding: Sharding,
) -> None:
    """Write the checkpoint `folder`, in place of what stood there; all processes save together.

    Where all see one disk, each writes its own rows into the files; elsewhere the leader of each disk writes them
    whole, gathered a tensor at a time. The files are the same. `beside` are further small files by name, `loose`
    such as the manifest does not name, as `amend` will change them.
    """
    draft = folder.with_name(f"{atomic_io.DRAFT}{folder.name}")
    tensors = {WEIGHTS: weights, MOMENTS: moments}
    heads = {name: _header(each) for name, each in tensors.items()}
    try:
        with council.error_barrier():
            if council.writes:
                if draft.exists():
                    atomic_io.remove(draft)
                small = sum(map(len, [*beside.values(), *loose.values()]))
                _check_space(folder, sum(end for _, _, end in heads.values()) + small)
                draft.mkdir(parents=True)
                for name, (head, _, end) in heads.items():
                    atomic_io.write_chunks(draft / name, [head])
                    os.truncate(draft / name, end)
        with council.error_barrier():
            for name, (_, offsets, _) in heads.items():
                if council.one_disk:
                    if sharding.first_replica and (sharding.sharded or council.writes):
                        atomic_io.write_at(draft / name, _own_rows(tensors[name], offsets))
                else:
                    wholes = (
                        (offsets[key], _bytes(sharding.gather_whole(rows)))
                        for key, rows in sorted(tensors[name].items())
                    )
                    if council.writes:
                        atomic_io.write_at(draft / name, wholes)
                    else:
                        for _ in wholes:  # takes part in the gathering
                            pass
        with council.error_barrier():
            if council.writes:
                for name, data in {**beside, **loose}.items():
                    atomic_io.write_bytes(draft / name, data)
                paths = {name: draft / name for name in [*heads, *beside]}
                files = {
                    name: {"bytes": path.stat().st_size, "sha256": atomic_io.sha256(path)}
                    for name, path in paths.items()
                }
                atomic_io.write_checksummed(draft / MANIFEST, {"format": FORMAT, **manifest, "files": files})
                atomic_io.settle(draft, folder)
    except BaseException:
        if council.writes:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def amend(folder: Path, beside: dict[str, bytes], **changes: Any) -> None:
    """Let the manifest of a checkpoint say `changes`, and name the small files `beside`, which are written anew.

    Whenever that is cut short the checkpoint is valid, with what its manifest said before.
    """
    manifest = read_manifest(folder)
    files = {name: file for name, file in manifest["files"].items() if name not in beside}
    if len(files) < len(manifest["files"]):  # what is named must not change
        atomic_io.write_checksummed(folder / MANIFEST, {**manifest, "files": files})
    for name, data in beside.items():
        atomic_io.write_bytes(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    atomic_io.write_checksummed(folder / MANIFEST, {**manifest, **changes, "files": files})


def _check_space(folder: Path, size: int) -> None:
    """DiskError where a checkpoint of `size` bytes and its manifest would not fit beside those that are there."""
    atomic_io.make_folder(folder.parent)
    needed, free = size + size // 50 + SLACK, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise DiskError(
            f"the checkpoint {folder} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; those before it are "
            "whole. Make room and run the same command again"
        )


def _header(tensors: dict[str, LocalShard]) -> tuple[bytes, dict[str, int], int]:
    """Head of a safetensors file with the tensors in the order of their names, their offsets, and the file's length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, rows in sorted(tensors.items()):
        begin, end = end, end + math.prod(rows.shape) * rows.local.element_size()
        header[name] = {"dtype": DTYPES[rows.local.dtype], "shape": list(rows.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    offsets = {name: len(head) + header[name]["data_offsets"][0] for name in tensors}
    return head, offsets, len(head) + end


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of whole tensors, durably."""
    head, _, _ = _header({name: LocalShard(tensor, tuple(tensor.shape), 0) for name, tensor in tensors.items()})
    atomic_io.write_chunks(path, itertools.chain([head], (_bytes(tensors[name]) for name in sorted(tensors))))


def _own_rows(tensors: dict[str, LocalShard], offsets: dict[str, int]) -> Iterator[tuple[int, memoryview]]:
    """What this process holds of each tensor, with its place in the file: rows lie there one after the other."""
    for name, rows in sorted(tensors.items()):
        if rows.local.numel():
            row_bytes = math.prod(rows.shape[1:]) * rows.local.element_size()
            yield offsets[name] + rows.low * row_bytes, _bytes(rows.local)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data


def tensor_names(path: Path) -> set[str]:
    """Names of what a safetensors file holds."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"{path} cannot be read: {error}") from error


def load_tensors(path: Path, into: dict[str, LocalShard], *, more: bool = False) -> None:
    """Copy this process's rows of a safetensors file into those of the same name, whatever world wrote it.

    RefusedError unless shapes agree, and names, but that the file may hold `more`.
    """
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            names = set(file.keys())
            if names != into.keys() and not (more and into.keys() <= names):
                odd = sorted(names ^ into.keys())[0]
                raise RefusedError(
                    f"{path} and the model of this recipe hold different tensors, {odd} is only in one of them: take "
                    "the model's keys from the recipe that it was trained with"
                )
            for name, rows in into.items():
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != rows.shape:
                    raise RefusedError(f"{path}: {name} is {stored.get_shape()}, the model's is {list(rows.shape)}")
                if rows.local.numel():
                    rows.local.copy_(stored[rows.low : rows.low + len(rows.local)])
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"{path} cannot be read: {error}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, with every file's sha256 verified. RefusedError names what is damaged or missing."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise RefusedError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise RefusedError(f"{path} is damaged: {path.stat().st_size} bytes instead of {expected['bytes']}")
        if atomic_io.sha256(path) != expected["sha256"]:
            raise RefusedError(f"{path} is damaged: its sha256 is not the recorded one")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, its own digest and its form verified."""
    path = folder / MANIFEST
    manifest = atomic_io.read_checksummed(path, most_bytes=1 << 20)
    files = manifest.get("files")
    if (
        manifest.get("format") not in (1, FORMAT)
        or not isinstance(files, dict)
        or not {WEIGHTS, MOMENTS} <= files.keys()
    ):
        raise RefusedError(
            f"{path} is no manifest that this version reads (format {str(manifest.get('format'))[:20]!r})"
        )
    if any(Path(name).name != name or name in ("", ".", "..") for name in files):
        raise RefusedError(f"{path} names a file outside of its folder: refused")
    if not _has_form(manifest):
        raise RefusedError(f"{path} is none of ours: what it says has not the form of a checkpoint's manifest")
    if folder.name.startswith("step-") and folder.name != f"step-{manifest['step']:06d}":
        raise RefusedError(f"{folder} holds another checkpoint, that of step {manifest['step']}: give it its name back")
    if manifest["format"] == 1 and (skip := manifest["science"].get("train.skip")):
        manifest["science"]["train.skip"] = counted_from_1(skip)
    if folder.parent.name == "checkpoints" and not _belongs(manifest, folder.parent.parent):
        owner = str(manifest["machine"].get("run"))[:100]
        raise ForeignError(
            f"{folder} is a checkpoint of another run ({owner}): take it out of there; to start from it, put it into "
            f"its own run and say run=NAME from={owner}/{folder.name}"
        )
    return manifest


def _belongs(manifest: dict[str, Any], run: Path) -> bool:
    """Whether the run made this checkpoint: by its identity; of earlier versions, which had none, by its science."""
    try:
        ours = identity(run)
        if ours and "run" in manifest:
            return bool(manifest["run"] == ours)
        kept = science(load(run / "recipe.yaml"))
    except LLMError:  # the run's own file is missing or damaged, and told by those who need it
        return True
    theirs = manifest["science"]
    return all(theirs.get(name) == kept.get(name) for name in [*kept, *theirs])


def _has_form(manifest: dict[str, Any]) -> bool:
    """Whether everything that is read from a manifest is there and of its kind, whoever wrote it."""

    def number(value: Any, least: float = 0) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 1 << 62

    science, metrics, scale, best = (manifest.get(name) for name in ("science", "metrics", "scale", "best"))
    curve = manifest.get("curve", [])
    skip = science.get("train.skip", []) if isinstance(science, dict) else []
    return (
        isinstance(manifest.get("step"), int)
        and number(manifest["step"])
        and isinstance(science, dict)
        and isinstance(skip, list)
        and all(isinstance(each, str) for each in [*skip, manifest.get("run", "")])
        and isinstance(metrics, dict)
        and number(metrics.get("bits_per_byte") or 0)
        and number(best or 0)
        and all(isinstance(manifest.get(name), str) for name in ("tokenizer", "data"))
        and isinstance(manifest.get("machine"), dict)
        and "parent" in manifest
        and isinstance(scale, list)
        and len(scale) == 2
        and all(map(number, scale))
        and isinstance(curve, list)
        and all(isinstance(each, list) and len(each) == 2 and all(map(number, each)) for each in curve)
        and all(
            isinstance(file, dict) and number(file.get("bytes")) and isinstance(file.get("sha256"), str)
            for file in manifest["files"].values()
        )
    )


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first, valid or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and step_of(path.name) >= 0]
    return sorted(found, key=lambda path: -step_of(path.name))


def up_to(run: Path, bound: int) -> list[Path]:
    return [folder for folder in folders(run) if step_of(folder.name) <= bound]


def newest(run: Path, warn: Callable[[str], None], bound: int = sys.maxsize) -> Checkpoint | None:
    """The newest valid checkpoint of at most step `bound`, None where there is none at all.

    Damaged ones and those of other runs are told to `warn` and passed over.

    RefusedError where there are some and all are such.
    """
    candidates = up_to(run, bound)
    for folder in candidates:
        try:
            return open_checkpoint(folder)
        except RefusedError as error:
            warn(f"{error}; {folder.name} is passed over")
    if candidates:
        raise RefusedError(
            f"{run}: all {len(candidates)} checkpoints are damaged or another run's; nothing was changed. Start "
            f"another run=NAME, or move {run / 'checkpoints'} away to begin this one anew"
        )
    return None


def readable(run: Path, bound: int = sys.maxsize, warn: Callable[[str], None] = lambda line: None) -> list[Checkpoint]:
    """The run's own whose manifest is sound, the newest first; those of other runs are told to `warn`."""
    found = []
    for folder in up_to(run, bound):
        try:
            found.append(Checkpoint(folder, read_manifest(folder)))
        except ForeignError as error:
            warn(f"{error}; {folder.name} is passed over")
        except RefusedError:
            continue
    return found


def best(run: Path, bound: int = sys.maxsize, warn: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The one with the fewest bits per byte among those of at most step `bound` that were evaluated at their step."""
    evaluated = [each for each in readable(run, bound, warn) if each.bits_per_byte is not None]
    return min(evaluated, key=lambda c: (c.bits_per_byte, c.step), default=None)


def retain(run: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, of at most `step`, which was just saved.

    Later ones were passed over as damaged: they count for nothing, and are replaced when their step is reached.
    """
    best_one = best(run, step)
    last = min((each.step for each in readable(run, step)[:keep]), default=0)  # that is kept for its age
    for folder in up_to(run, step):
        if step_of(folder.name) < last and (best_one is None or folder != best_one.folder):
            atomic_io.remove(folder)
