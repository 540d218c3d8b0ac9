"""Token shards: Arrow streams whose rows are documents, each BOS and its ids, read as one long row of tokens by memory map.

A file holds one record batch, so that its tokens lie in one piece and a window is a view. How long windows are is not baked in. A
file is finished once the journal names it; the manifest comes last and makes the folder a whole.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm import store
from llm.corpus import is_validation
from llm.errors import RefusedError
from llm.tokenizer import Tokenizer

FORMAT = 1
FILE = 32 << 20  # bytes of text in a file: what is held in memory before it is written
BLOCK = 4 << 20  # bytes of text in a row of the pipeline: small next to memory, large next to what a row costs
SIDES = ("train", "validation")

Item = TypeVar("Item")


class Side:
    """The training or the validation side: its documents end to end, `tokens` of them in all."""

    def __init__(self, folder: Path, files: list[dict[str, Any]], dtype: str) -> None:
        self.tokens = sum(file["tokens"] for file in files)
        self.documents = sum(file["documents"] for file in files)
        self.text_bytes = sum(file["text_bytes"] for file in files)
        self.dtype = np.dtype(dtype)
        self._columns = [_open(folder / file["name"], file, self.dtype) for file in files]
        self._starts = np.cumsum([0] + [file["tokens"] for file in files])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: (stop - start,) of the shards' integer type, a view where they lie in one file.

        IndexError past the last token.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        parts: list[np.ndarray] = []
        while start < stop:
            file = int(np.searchsorted(self._starts, start, side="right")) - 1
            begin = int(self._starts[file])
            parts.append(self._columns[file][0][start - begin : stop - begin])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def document_starts(self) -> np.ndarray:
        """Where each document's BOS stands: (documents,) of int64."""
        parts = [starts[:-1].astype(np.int64) + begin for (_, starts), begin in zip(self._columns, self._starts, strict=False)]
        return np.concatenate([*parts, np.empty(0, np.int64)])


class Shards:
    """An opened folder of shards. `fingerprint` says which text, split and tokenizer they are of."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.train, self.validation = (Side(folder, manifest["files"][side], manifest["dtype"]) for side in SIDES)

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "Shards":
        """Map the files, sizes and counts checked; every byte too with `verify`. RefusedError names the file that does not agree."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise RefusedError(f"{folder} holds no finished shards: prepare the text again")
        manifest = store.read_json(path)
        if not isinstance(manifest, dict) or manifest.get("digest") != store.digest_of({**manifest, "digest": None}):
            raise RefusedError(f"{path} is damaged: {_mend(folder)}")
        if manifest["format"] != FORMAT:
            raise RefusedError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: {_mend(folder)}")
        for file in (file for side in SIDES for file in manifest["files"][side] if verify):
            if not (folder / file["name"]).is_file() or store.sha256(folder / file["name"]) != file["sha256"]:
                raise RefusedError(f"{folder / file['name']} is missing or damaged (sha256): {_mend(folder)}")
        return cls(folder, manifest)


def _mend(folder: Path) -> str:
    return f"remove {folder} and prepare the text again"


def _open(path: Path, file: dict[str, Any], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Views of the file's tokens and of where its documents begin (and the last one ends)."""
    import pyarrow

    if not path.is_file() or path.stat().st_size != file["bytes"]:
        raise RefusedError(f"{path} is missing or has another size than {file['bytes']} bytes: {_mend(path.parent)}")
    try:
        with pyarrow.memory_map(str(path)) as source:  # the map outlives the handle
            column = pyarrow.ipc.open_stream(source).read_all()["tokens"].chunk(0)
        tokens, starts = column.values.to_numpy(), column.offsets.to_numpy()
    except (pyarrow.ArrowInvalid, OSError, KeyError, IndexError, AttributeError) as error:
        raise RefusedError(f"{path} is damaged: {_mend(path.parent)}") from error
    if tokens.dtype != dtype or len(tokens) != file["tokens"] or len(starts) != file["documents"] + 1:
        raise RefusedError(f"{path} does not hold the {file['tokens']} tokens of its manifest: {_mend(path.parent)}")
    return tokens, starts


def write(documents: Iterable[bytes], folder: Path, tokenizer: Tokenizer, *, share: float, about: dict[str, Any]) -> Iterator[int]:
    """Encode `documents` into shards in `folder`; yields the bytes of text as they are done, and at the end the shards are whole.

    Files that an earlier, killed call finished are kept, if they are what its journal says. `about` goes into the manifest. The
    caller holds the folder's lock, and gives the documents that the earlier call got.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _finished(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)
    done = {side: sum(file["documents"] for file in files[side]) for side in SIDES}
    yield sum(file["text_bytes"] for side in SIDES for file in files[side])
    open_blocks: dict[str, list[Any]] = {side: [] for side in SIDES}
    for block in ahead(_encoded(blocks(documents, share, done), tokenizer, dtype)):
        waiting = open_blocks[block["side"]]
        waiting.append(block)
        yield block["text_bytes"]
        if sum(each["text_bytes"] for each in waiting) >= FILE:
            _write_file(folder, files, block["side"], waiting)
    for side in SIDES:
        if open_blocks[side]:
            _write_file(folder, files, side, open_blocks[side])
    manifest = {"format": FORMAT, **about, "dtype": dtype.name, "files": files, "digest": None}
    store.write_json(folder / "manifest.json", {**manifest, "digest": store.digest_of(manifest)})
    (folder / "journal.json").unlink(missing_ok=True)


def _finished(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The files that the journal names and that are still what it says; all else of the folder is swept away."""
    files: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    journal = folder / "journal.json"
    if journal.is_file():
        for side, named in store.read_json(journal).items():
            for file in named:
                path = folder / file["name"]
                if not path.is_file() or store.sha256(path) != file["sha256"]:
                    break
                files[side].append(file)
    kept = {"journal.json", *(file["name"] for side in SIDES for file in files[side])}
    for path in folder.iterdir():
        if path.name not in kept:
            store.remove(path)
    return files


def blocks(documents: Iterable[bytes], share: float, done: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Documents of one side, about BLOCK bytes of them a block, without the first `done` of each side, which are whole blocks."""
    gathered: dict[str, list[bytes]] = {side: [] for side in SIDES}
    size, skip = dict.fromkeys(SIDES, 0), dict(done)
    for document in documents:
        side = SIDES[is_validation(document, share)]
        if skip[side]:
            skip[side] -= 1
            continue
        gathered[side].append(document)
        size[side] += len(document)
        if size[side] >= BLOCK:
            yield {"side": side, "text": b"".join(gathered[side]), "lengths": list(map(len, gathered[side]))}
            gathered[side], size[side] = [], 0
    for side in SIDES:
        if gathered[side]:
            yield {"side": side, "text": b"".join(gathered[side]), "lengths": list(map(len, gathered[side]))}


def _encoded(source: Iterator[dict[str, Any]], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[dict[str, Any]]:
    """Each block as {side, text_bytes, tokens: ids of all documents end to end, starts: where each begins}, through `datasets`."""
    import datasets
    import pyarrow

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def encode(table: pyarrow.Table) -> pyarrow.Table:
        text, ends = table["text"][0].as_py(), np.cumsum(table["lengths"].chunk(0).values.to_numpy())
        documents = [text[begin:end].decode() for begin, end in itertools.pairwise([0, *ends.tolist()])]
        encoded = tokenizer.encode_batch(documents, threads)
        starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded)], dtype=np.int32)
        tokens = np.full(starts[-1], tokenizer.bos, dtype)
        of_text = np.ones(len(tokens), bool)
        of_text[starts[:-1]] = False
        tokens[of_text] = np.concatenate(encoded)
        row = {"tokens": pyarrow.array([tokens]), "starts": pyarrow.array([starts]), "text_bytes": pyarrow.array([len(text)])}
        return pyarrow.table({"side": table["side"], **row})

    features = datasets.Features({
        "side": datasets.Value("string"), "text": datasets.Value("large_binary"),
        "lengths": datasets.List(datasets.Value("int32"))})  # fmt: skip
    stream = datasets.IterableDataset.from_generator(_Blocks(source), features=features)
    for table in stream.with_format("arrow").map(encode):
        block = {name: table[name][0].as_py() for name in ("side", "text_bytes")}
        yield block | {name: table[name].chunk(0).values.to_numpy() for name in ("tokens", "starts")}


class _Blocks:
    """A generator as `datasets` takes it, which hashes what it is given by pickling it and cannot pickle a generator."""

    def __init__(self, source: Iterator[dict[str, Any]]) -> None:
        self._source = source

    def __call__(self) -> Iterator[dict[str, Any]]:
        return ahead(self._source)

    def __reduce__(self) -> str | tuple[Any, ...]:
        return object, ()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each next one made by a thread while the caller is busy with the last."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(next, source, end)
        while (item := following.result()) is not end:
            following = maker.submit(next, source, end)
            yield item  # type: ignore[misc]


def _write_file(folder: Path, files: dict[str, list[dict[str, Any]]], side: str, waiting: list[Any]) -> None:
    """Put the blocks that wait into the side's next file, name it in the journal, and leave none waiting."""
    import pyarrow

    tokens = np.concatenate([block["tokens"] for block in waiting])
    begins = np.cumsum([0] + [len(block["tokens"]) for block in waiting])
    starts = np.concatenate([*(block["starts"][:-1] + begin for block, begin in zip(waiting, begins, strict=False)), begins[-1:]])
    rows = pyarrow.ListArray.from_arrays(pyarrow.array(starts, pyarrow.int32()), pyarrow.array(tokens))
    batch = pyarrow.record_batch({"tokens": rows})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = memoryview(sink.getvalue())
    name = f"{side}-{len(files[side]):05d}.arrow"
    store.write_bytes(folder / name, data)
    files[side].append({
        "name": name, "documents": len(rows), "tokens": len(tokens), "text_bytes": sum(block["text_bytes"] for block in waiting),
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})  # fmt: skip
    store.write_json(folder / "journal.json", files)
    waiting.clear()
