"""Token shards: Arrow streams whose rows are documents (BOS and ids), memory-mapped and read as one row of tokens.

Beside the ids of a conversation stand their parts, which tell what is to be learnt (chat_template.py).

A file holds one record batch, so its tokens are contiguous and a window of any length is a view. A file is finished
once the journal names it; the manifest is written last and completes the folder.
"""

import hashlib
import itertools
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RefusedError

FORMAT = 1
SMALL = 128 << 20  # bytes of shards up to which every start checks their sha256, in a fraction of a second
SIDES = ("train", "validation")
PLACE = "shards.json"  # in a run's folder

Files = dict[str, list[dict[str, Any]]]  # the manifest's entries, by side


class Split:
    """The training or validation side: its documents end to end, `tokens` tokens in all."""

    def __init__(self, folder: Path, files: list[dict[str, Any]], dtype: str) -> None:
        self.tokens: int = sum(file["tokens"] for file in files)
        self.documents: int = sum(file["documents"] for file in files)
        self.text_bytes: int = sum(file["text_bytes"] for file in files)
        self.dtype = np.dtype(dtype)
        self._files = [(folder / file["name"], file) for file in files]
        self._columns = [_map(path, file, self.dtype) for path, file in self._files]
        self._begins = np.cumsum([0] + [file["tokens"] for file in files])

    @classmethod
    def joined(cls, sides: "Iterable[Split]") -> "Split":
        """Sides in the same tokens end to end, as one."""
        sides = list(sides)
        whole = cls(Path(), [], sides[0].dtype.name)
        whole.tokens, whole.documents, whole.text_bytes = (
            sum(getattr(side, name) for side in sides) for name in ("tokens", "documents", "text_bytes")
        )
        whole._files = list(itertools.chain(*(side._files for side in sides)))
        whole._columns = list(itertools.chain(*(side._columns for side in sides)))
        whole._begins = np.cumsum([0] + [file["tokens"] for _, file in whole._files])
        return whole

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: (stop - start,) of the shards' integer type, a view unless two files meet in it.

        IndexError past the last token.
        """
        return self._read([each.tokens for each in self._columns] or [np.empty(0, self.dtype)], start, stop)

    def parts(self, start: int, stop: int) -> np.ndarray:
        """The part that each of these tokens plays in its conversation: (stop - start,) of uint8."""
        return self._read([each.parts for each in self._columns] or [np.empty(0, np.uint8)], start, stop)

    @property
    def has_parts(self) -> bool:
        return any(len(each.parts) for each in self._columns)

    def _read(self, column: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        parts: list[np.ndarray] = []
        while start < stop:
            file = int(np.searchsorted(self._begins, start, side="right")) - 1
            begin = int(self._begins[file])
            parts.append(column[file][start - begin : stop - begin])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([column[0][:0], *parts])

    def verified(self) -> "Split":
        """This side, checked. RefusedError names a file whose mapped bytes have changed since it was written."""
        for (path, file), column in zip(self._files, self._columns, strict=True):
            # Reading past the end of a file that was cut kills the process, so its size is checked first.
            cut = path.is_file() and path.stat().st_size != file["bytes"]
            if cut or hashlib.sha256(column.data).hexdigest() != file["sha256"]:
                raise RefusedError(f"{path} was damaged while it was in use: {_mend(path.parent)}")
        return self

    def document_starts(self) -> np.ndarray:
        """Where each document's BOS stands: (documents,) of int64."""
        columns = zip(self._columns, self._begins[:-1], strict=True)
        starts = (np.add(each.starts[:-1], at, dtype=np.int64) for each, at in columns)
        return np.concatenate([np.empty(0, np.int64), *starts])

    @property
    def has_keys(self) -> bool:
        """False for shards of earlier versions."""
        return sum(len(each.keys) for each in self._columns) == self.documents

    def document_keys(self) -> np.ndarray:
        """documents.key_of each document: (documents,) of uint64. Shards of earlier versions have none."""
        return np.concatenate([np.empty(0, np.uint64), *(each.keys for each in self._columns)])

    def document_sizes(self) -> np.ndarray:
        """The bytes of each document's text: (documents,) of int32. Shards of earlier versions have none."""
        return np.concatenate([np.empty(0, np.int32), *(each.sizes for each in self._columns)])


class Shards:
    """An opened folder of shards. `fingerprint` identifies their text, split and tokenizer."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.also: Shards | None = None  # of evaluate.also, in the same tokens
        self.seen: dict[str, Any] = {}  # the files that they were made of (Corpus.seen), as far as that is known
        self.is_chat = "template" in manifest  # its documents are conversations
        self.train, self.validation = (Split(folder, manifest["files"][side], manifest["dtype"]) for side in SIDES)

    @property
    def sources(self) -> "dict[str, Shards]":
        """One text without a name, as MixedShards has several with names."""
        return {"": self}

    @classmethod
    def open(cls, folder: Path, verify: bool | None = False) -> "Shards":
        """Map the files and check sizes and counts, with `verify` every byte; None: if that is a matter of moments.

        RefusedError names the faulty file.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise RefusedError(f"{folder} holds no finished shards: prepare the text again")
        try:
            manifest = atomic_io.read_checksummed(path)
        except RefusedError as error:
            raise RefusedError(f"{error}: {_mend(folder)}") from error
        if manifest["format"] != FORMAT:
            raise RefusedError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: {_mend(folder)}")
        files = [*itertools.chain(*manifest["files"].values())]
        if verify is None:
            verify = sum(file["bytes"] for file in files) <= SMALL
        for file in files:
            if verify and not is_whole(folder, file):
                raise RefusedError(f"{folder / file['name']} is missing or damaged (sha256): {_mend(folder)}")
        return cls(folder, manifest)


class MixedShards:
    """The shards of several texts in the same tokens, by name; `train` and `validation` are theirs end to end."""

    def __init__(self, sources: dict[str, Shards]) -> None:
        self.sources = sources
        self.fingerprint = atomic_io.digest_of({name: each.fingerprint for name, each in sources.items()})
        self.also: Shards | None = None
        self.is_chat = any(each.is_chat for each in sources.values())
        self.train = Split.joined(each.train for each in sources.values())
        self.validation = Split.joined(each.validation for each in sources.values())


AnyShards: TypeAlias = Shards | MixedShards


def keep_place(shards: AnyShards, run: Path) -> None:
    """Record in a run's folder where its shards lie and what they hold, and those of evaluate.also."""
    also = {"also": _place(shards.also)} if shards.also else {}
    if isinstance(shards, MixedShards):
        held: dict[str, Any] = {"sources": {name: _whole_place(each) for name, each in shards.sources.items()}}
    else:
        held = _whole_place(shards)
    atomic_io.write_checksummed(run / PLACE, {**held, **also})


def _whole_place(shards: Shards) -> dict[str, Any]:
    return {**_place(shards), **shards.manifest}


def _place(shards: Shards) -> dict[str, Any]:
    place = {"folder": str(shards.folder), "absolute": str(shards.folder.resolve())}
    return {**place, "fingerprint": shards.fingerprint, "seen": shards.seen}


def of_run(run: Path, verify: bool | None = False) -> AnyShards:
    """The shards of a run, from any working folder and after both were moved together. RefusedError if not found.

    A relative path starts at the project, the folder whose runs/ holds the run.
    """
    kept = atomic_io.read_checksummed(run / PLACE)
    if "sources" in kept:
        sources = {name: _placed(run, each, verify) for name, each in kept["sources"].items()}
        shards: AnyShards = MixedShards(sources)
    else:
        shards = _placed(run, kept, verify)
    if "also" in kept:
        with suppress(RefusedError):  # only evaluations while training read them
            shards.also = _placed(run, kept["also"], verify)
    return shards


def _placed(run: Path, kept: dict[str, Any], verify: bool | None) -> Shards:
    tops = (run.absolute().parent.parent, run.resolve().parent.parent, Path())
    places = [*(top / kept["folder"] for top in tops), Path(kept.get("absolute", kept["folder"]))]
    found = next((place for place in places if (place / "manifest.json").is_file()), places[0])
    shards = Shards.open(found, verify)
    if shards.fingerprint != kept["fingerprint"]:
        raise RefusedError(f"{found} holds another text than {run.name} was trained on: {_mend(found)}")
    shards.seen = kept.get("seen", {})
    return shards


def _mend(folder: Path) -> str:
    return f"remove {folder} and prepare the text again"


def is_whole(folder: Path, file: dict[str, Any]) -> bool:
    path = folder / file["name"]
    return path.is_file() and path.stat().st_size == file["bytes"] and atomic_io.sha256(path) == file["sha256"]


class _Columns(NamedTuple):
    """Views of a mapped file: per token its id and part; per document its start (and the end), key and size."""

    tokens: np.ndarray
    parts: np.ndarray
    starts: np.ndarray  # (documents + 1,)
    keys: np.ndarray
    sizes: np.ndarray
    data: Any  # the whole mapping


def _map(path: Path, file: dict[str, Any], dtype: np.dtype) -> _Columns:
    import pyarrow

    if not path.is_file() or path.stat().st_size != file["bytes"]:
        raise RefusedError(f"{path} is missing or is not {file['bytes']} bytes long: {_mend(path.parent)}")
    try:
        with pyarrow.memory_map(str(path)) as source:  # the buffer keeps the mapping alive, without the open file
            data = source.read_buffer()
        table = pyarrow.ipc.open_stream(data).read_all()
        column = table["tokens"].chunk(0)
        tokens, starts = view(column.values), view(column.offsets)
        names = table.column_names
        parts = view(table["parts"].chunk(0).values) if "parts" in names else np.empty(0, np.uint8)
        keys = view(table["key"].chunk(0)) if "key" in names else np.empty(0, np.uint64)
        sizes = view(table["size"].chunk(0)) if "size" in names else np.empty(0, np.int32)
    except (pyarrow.ArrowInvalid, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise RefusedError(f"{path} is damaged: {_mend(path.parent)}") from error
    if len(parts) not in (0, len(tokens)):
        raise RefusedError(f"{path} does not hold a part for each token: {_mend(path.parent)}")
    if tokens.dtype != dtype or len(tokens) != file["tokens"] or len(starts) != file["documents"] + 1:
        raise RefusedError(f"{path} does not hold the {file['tokens']} tokens of its manifest: {_mend(path.parent)}")
    return _Columns(tokens, parts, starts, keys, sizes, data)


def view(array: Any) -> np.ndarray:
    """An Arrow array as NumPy, without copying; its own `to_numpy` imports pandas."""
    dtype = np.dtype(str(array.type))
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
