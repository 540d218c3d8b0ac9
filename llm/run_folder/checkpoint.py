"""Checkpoints: runs/NAME/checkpoints/step-000100/ with weights and moments as safetensors and a manifest; no pickle.

A folder under its final name is whole: it was filled under another name, flushed and renamed. The bytes of its files
depend on the tensors alone, so that equal digests mean equal weights and moments. No file is loaded unless its sha256
is right.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import DiskError, LLMError, RefusedError
from llm.config.reading import load
from llm.config.resolving import counted_from_1
from llm.config.schema import STEP, science
from llm.distributed.coordinator import Coordinator
from llm.distributed.sharding import LocalShard, Sharding
from llm.run_folder.tensor_files import as_bytes, header, own_rows

FORMAT = 2  # of a manifest; in format 1, train.skip counted steps from 0
# Keys of the science half that earlier versions had not, with the values by which they trained.
LATER_KEYS = {
    "train.on": "auto",
    "train.document_mask": False,
    "train.sampled_softmax": 0,
    "train.shallow": 0,
    "train.teachers": [],
    "train.teachers_share": 0.6,
    "train.teachers_last": 0.0,
}
IDENTITY = "identity.json"  # in the run
MANIFEST = "checkpoint.json"
WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
PIECE = 4 << 20  # bytes hashed and written at once
SLACK = 64 << 10  # bytes of a manifest, and of the file system's own records


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def bits_per_byte(self) -> float | None:
        """Of the evaluation at this step, if there was one."""
        return self.manifest["metrics"].get("bits_per_byte")

    @property
    def digest(self) -> str:
        """Digest of weights and moments."""
        return atomic_io.digest_of([self.manifest["files"][name]["sha256"] for name in (WEIGHTS, MOMENTS)])


class ForeignError(RefusedError):
    """A checkpoint made by another run."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(name: str) -> int:
    """The N of step-N; -1 for any other name."""
    match = re.fullmatch(STEP, name)
    return int(match[1]) if match else -1


def identity(run: Path) -> str | None:
    """The run's identity, which each of its checkpoints carries too; None in runs of earlier versions.

    RefusedError where its file is damaged.
    """
    path = run / IDENTITY
    return str(atomic_io.read_checksummed(path).get("run")) if path.exists() else None


@contextmanager
def still_there(run: Path) -> Iterator[None]:
    """DiskError if the folder of a run that trains was removed, before the block or in it, as by `rm -r runs/NAME`."""

    def there() -> bool:
        return (run / IDENTITY).is_file()

    try:
        if not there():
            raise FileNotFoundError(run)
        yield
    except (FileNotFoundError, RefusedError) as error:
        if there():
            raise
        raise DiskError(f"{run} was removed while it trained: run the same command again to begin anew") from error


@dataclass
class Draft:
    """The checkpoint `folder` in the making; all ranks make it together.

    On a shared disk each rank writes the rows that it holds; otherwise one rank per disk writes all tensors, gathered
    one at a time. The bytes are the same. `extra_files` are small files by name; `unlisted_files` are such too, but the
    manifest leaves them out, as `amend` will replace them. With `copied` the tensors are no longer the model's own but
    hold what this rank writes, and `fill` sends nothing to other ranks.
    """

    folder: Path
    weights: dict[str, LocalShard]
    moments: dict[str, LocalShard]
    manifest: dict[str, Any]
    extra_files: dict[str, bytes]
    unlisted_files: dict[str, bytes]
    coordinator: Coordinator
    sharding: Sharding
    copied: bool = False
    given_up: bool = False
    digests: dict[str, str] = field(default_factory=dict)  # of the files that this rank wrote alone

    @property
    def path(self) -> Path:
        """The folder before it has its final name."""
        return self.folder.with_name(f"{atomic_io.DRAFT}{self.folder.name}")

    @property
    def tensors(self) -> dict[str, dict[str, LocalShard]]:
        """By the name of their file."""
        return {WEIGHTS: self.weights, MOMENTS: self.moments}

    @property
    def shared(self) -> bool:
        """Whether several ranks write into one file."""
        return self.sharding.sharded and self.coordinator.one_disk

    @property
    def fills(self) -> bool:
        """Whether this rank writes tensors."""
        return self.sharding.first_replica if self.shared else self.coordinator.writes

    @cached_property
    def headers(self) -> dict[str, tuple[bytes, dict[str, int], int]]:
        """Head of each file, offset of each of its tensors, and its length."""
        return {name: header(each) for name, each in self.tensors.items()}

    def together(self, *parts: Callable[[], None]) -> None:
        """Do `parts` of the work with all ranks, here and now; `allocate`, `fill` and `finish` are the whole of it."""
        try:
            for part in parts:
                with self.coordinator.error_barrier():
                    part()
        except BaseException:
            self.abandon()
            raise

    def allocate(self) -> None:
        """Make the files, of their full length. DiskError where the disk has no room for them."""
        if self.coordinator.writes:
            if self.path.exists():
                atomic_io.remove(self.path)
            sizes = [end for _, _, end in self.headers.values()]
            _check_space(self.folder, sum([*sizes, *map(len, (self.extra_files | self.unlisted_files).values())]))
            self.path.mkdir()
            for name, (_, _, end) in self.headers.items():
                (self.path / name).touch()
                os.truncate(self.path / name, end)

    def fill(self) -> None:
        """Write the heads and the tensors."""
        for file, (head, offsets, _) in self.headers.items():
            rows = self._rows(self.tensors[file], offsets)
            if self.fills:
                heads = [(0, head)] if self.coordinator.writes else []
                digest = None if self.shared else hashlib.sha256()
                atomic_io.write_at(self.path / file, self._pieces(chain(heads, rows), digest))
                if digest is not None:
                    self.digests[file] = digest.hexdigest()
            else:
                deque(rows, maxlen=0)  # takes part in gathering

    def _rows(self, tensors: dict[str, LocalShard], offsets: dict[str, int]) -> Iterator[tuple[int, memoryview]]:
        """The bytes of `tensors` that this rank writes, each with its offset, in the order of the file."""
        if self.copied or self.shared or not self.sharding.sharded:
            return own_rows(tensors, offsets) if self.fills else iter(())
        gathered = ((name, self.sharding.gather_whole(shard)) for name, shard in sorted(tensors.items()))
        return ((offsets[name], as_bytes(whole)) for name, whole in gathered)

    def _pieces(
        self, chunks: Iterable[tuple[int, bytes | memoryview]], digest: Any
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """`chunks` in pieces, which go into `digest` while they are in the processor's cache."""
        for offset, chunk in chunks:
            for low in range(0, len(chunk), PIECE):
                piece = chunk[low : low + PIECE]
                if self.given_up:
                    raise InterruptedError(errno.EINTR, "given up", str(self.path))
                if digest is not None:
                    digest.update(piece)
                yield offset + low, piece

    def finish(self) -> None:
        """Write the small files and the manifest with its digests, and give the folder its final name."""
        if not self.coordinator.writes:
            return
        for name, data in {**self.extra_files, **self.unlisted_files}.items():
            atomic_io.write_bytes(self.path / name, data)
        files = {}
        for path in (self.path / name for name in [*self.headers, *self.extra_files]):
            digest = self.digests.get(path.name) or atomic_io.sha256(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        atomic_io.write_checksummed(self.path / MANIFEST, {"format": FORMAT, **self.manifest, "files": files})
        atomic_io.settle(self.path, self.folder)

    def give_up(self) -> None:
        """Let `fill`, in another thread, end soon."""
        self.given_up = True

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self.coordinator.writes:
            shutil.rmtree(self.path, ignore_errors=True)


def amend(folder: Path, extra_files: dict[str, bytes], **changes: Any) -> None:
    """Apply `changes` to the manifest of a checkpoint, and write `extra_files` and list them in it.

    If this is interrupted, the checkpoint is still valid, with its manifest as before.
    """
    manifest = read_manifest(folder)
    files = {name: file for name, file in manifest["files"].items() if name not in extra_files}
    if len(files) < len(manifest["files"]):  # a listed file must not change
        atomic_io.write_checksummed(folder / MANIFEST, {**manifest, "files": files})
    for name, data in extra_files.items():
        atomic_io.write_bytes(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    atomic_io.write_checksummed(folder / MANIFEST, {**manifest, **changes, "files": files})


def _check_space(folder: Path, size: int) -> None:
    """DiskError unless the disk has room for a checkpoint of `size` bytes and its manifest."""
    atomic_io.make_folder(folder.parent)
    needed, free = size + size // 50 + SLACK, shutil.disk_usage(folder.parent).free
    if free < needed:
        fault = f"the checkpoint {folder} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise DiskError(f"{fault}; earlier ones are whole. Make room and run the same command again")


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, its files verified. RefusedError names a file that is damaged or missing."""
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
    """The manifest alone, with its digest and its form verified."""
    path = folder / MANIFEST
    manifest = atomic_io.read_checksummed(path, most_bytes=1 << 20)
    files, format = manifest.get("files"), manifest.get("format")
    if format not in (1, FORMAT) or not isinstance(files, dict) or not {WEIGHTS, MOMENTS} <= files.keys():
        raise RefusedError(f"{path} is not a manifest that this version reads (format {str(format)[:20]!r})")
    if any(Path(name).name != name or name in ("", ".", "..") for name in files):
        raise RefusedError(f"{path} names a file outside of its folder: refused")
    if not _has_form(manifest):
        raise RefusedError(f"{path} is damaged or foreign: a field of it is missing or of another type")
    true_name = f"step-{manifest['step']:06d}"
    if folder.name.startswith("step-") and folder.name != true_name:
        raise RefusedError(f"{folder} holds the checkpoint of step {manifest['step']}: rename it to {true_name}")
    manifest["science"] = LATER_KEYS | manifest["science"]
    if manifest["format"] == 1 and (skip := manifest["science"].get("train.skip")):
        manifest["science"]["train.skip"] = counted_from_1(skip)
    if folder.parent.name == "checkpoints" and not _belongs(manifest, folder.parent.parent):
        owner = str(manifest["machine"].get("run"))[:100]
        mend = f"to start from it, put it into its own run and say run=NAME from={owner}/{folder.name}"
        raise ForeignError(f"{folder} is a checkpoint of another run ({owner}): take it out of there; {mend}")
    return manifest


def _belongs(manifest: dict[str, Any], run: Path) -> bool:
    """Whether the run made this checkpoint: by its identity, or by its science where an earlier version wrote none."""
    try:
        ours = identity(run)
        if ours and "run" in manifest:
            return bool(manifest["run"] == ours)
        kept = science(load(run / "recipe.yaml"))
    except LLMError:  # the run's own file is missing or damaged; its readers report that
        return True
    theirs = manifest["science"]
    return all(theirs.get(name) == kept.get(name) for name in [*kept, *theirs])


def _has_form(manifest: dict[str, Any]) -> bool:
    """Whether every field that is read from a manifest is there and of its type, whoever wrote it."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 62

    def pair(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))

    def file(value: Any) -> bool:
        return isinstance(value, dict) and number(value.get("bytes")) and isinstance(value.get("sha256"), str)

    kinds = {"step": int, "science": dict, "metrics": dict, "machine": dict, "tokenizer": str, "data": str}
    if "parent" not in manifest or not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    skip, curve = manifest["science"].get("train.skip", []), manifest.get("curve", [])
    numbers = manifest["step"], manifest["metrics"].get("bits_per_byte") or 0, manifest.get("best") or 0
    return (
        all(map(number, numbers))
        and isinstance(skip, list)
        and all(isinstance(each, str) for each in [*skip, manifest.get("run", "")])
        and isinstance(curve, list)
        and all(map(pair, [manifest.get("scale"), *curve]))
        and all(map(file, manifest["files"].values()))
    )


def folders(run: Path, bound: int = sys.maxsize) -> list[Path]:
    """Checkpoint folders of a run of at most step `bound`, the newest first, valid or not."""
    named = [path for path in (run / "checkpoints").glob("step-*") if 0 <= step_of(path.name) <= bound]
    return sorted(filter(Path.is_dir, named), key=lambda path: -step_of(path.name))


def newest(run: Path, warn: Callable[[str], None], bound: int = sys.maxsize) -> Checkpoint | None:
    """The newest valid checkpoint of at most step `bound`; None where there is no checkpoint at all.

    Damaged ones and those of other runs are passed over with a line to `warn`; RefusedError where no other is left.
    """
    candidates = folders(run, bound)
    for folder in candidates:
        try:
            return open_checkpoint(folder)
        except RefusedError as error:
            warn(f"{error}; {folder.name} is passed over")
    if candidates:
        mend = f"Start another run=NAME, or move {run / 'checkpoints'} away to begin this one anew"
        fault = f"all {len(candidates)} checkpoints are damaged or another run's; nothing was changed"
        raise RefusedError(f"{run}: {fault}. {mend}")
    return None


def readable(run: Path, bound: int = sys.maxsize, warn: Callable[[str], None] = lambda line: None) -> list[Checkpoint]:
    """The run's own checkpoints with a valid manifest, the newest first; those of other runs are reported to `warn`."""
    found = []
    for folder in folders(run, bound):
        try:
            found.append(Checkpoint(folder, read_manifest(folder)))
        except ForeignError as error:
            warn(f"{error}; {folder.name} is passed over")
        except RefusedError:
            continue
    return found


def best(run: Path, bound: int = sys.maxsize, warn: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The checkpoint of at most step `bound` with the fewest bits per byte, among those evaluated at their step."""
    evaluated = [each for each in readable(run, bound, warn) if each.bits_per_byte is not None]
    return min(evaluated, key=lambda c: (c.bits_per_byte, c.step), default=None)


def retain(run: Path, keep: int, step: int) -> None:
    """Remove all checkpoints up to `step`, the one just saved, except for the newest `keep` and the best.

    Later ones were passed over as damaged: they do not count, and are replaced when their step is reached.
    """
    best_one = best(run, step)
    last = min((each.step for each in readable(run, step)[:keep]), default=0)  # the oldest that is kept for its age
    for folder in folders(run, step):
        if step_of(folder.name) < last and (best_one is None or folder != best_one.folder):
            atomic_io.remove(folder)
