"""Token shards: Arrow streams whose rows are documents (BOS and ids), memory-mapped and read as one row of tokens.

Beside the ids of a conversation stand their parts, which tell what is to be learnt (chat_template.py).

A file holds one record batch, so its tokens are contiguous and a window of any length is a view. A file is finished
once the journal names it; the manifest is written last and completes the folder.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.data.documents import is_validation
from llm.data.encoding import ConversationEncoder, LocalEncoder, ProcessEncoder
from llm.data.sources import lean_datasets
from llm.data.tokenizer import Tokenizer
from llm.distributed.threads import cores

FORMAT = 1
FILE = 16 << 20  # bytes of text in a file, which are held in memory until it is written
BLOCK = 1 << 20  # bytes of text encoded at once: little memory, yet the overhead per block does not matter
SMALL = 128 << 20  # bytes of shards up to which every start checks their sha256, in a fraction of a second
SIDES = ("train", "validation")
PLACE = "shards.json"  # in a run's folder

Files = dict[str, list[dict[str, Any]]]  # the manifest's entries, by side
Block = dict[str, Any]  # of one side: text and lengths of its documents; once encoded, their tokens and starts


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

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: (stop - start,) of the shards' integer type, a view unless two files meet in it.

        IndexError past the last token.
        """
        return self._read([tokens for tokens, *_ in self._columns] or [np.empty(0, self.dtype)], start, stop)

    def parts(self, start: int, stop: int) -> np.ndarray:
        """The part that each of these tokens plays in its conversation: (stop - start,) of uint8."""
        return self._read([parts for *_, parts in self._columns] or [np.empty(0, np.uint8)], start, stop)

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
        for (path, file), (_, _, data, _) in zip(self._files, self._columns, strict=True):
            # Reading past the end of a file that was cut kills the process, so its size is checked first.
            cut = path.is_file() and path.stat().st_size != file["bytes"]
            if cut or hashlib.sha256(data).hexdigest() != file["sha256"]:
                raise RefusedError(f"{path} was damaged while it was in use: {_mend(path.parent)}")
        return self

    def document_starts(self) -> np.ndarray:
        """Where each document's BOS stands: (documents,) of int64."""
        columns = zip(self._columns, self._begins[:-1], strict=True)
        starts = (np.add(s[:-1], at, dtype=np.int64) for (_, s, _, _), at in columns)
        return np.concatenate([np.empty(0, np.int64), *starts])


class Shards:
    """An opened folder of shards. `fingerprint` identifies their text, split and tokenizer."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.also: Shards | None = None  # of evaluate.also, in the same tokens
        self.seen: dict[str, Any] = {}  # the files that they were made of (Corpus.seen), as far as that is known
        self.is_chat = "template" in manifest  # its documents are conversations
        self.train, self.validation = (Split(folder, manifest["files"][side], manifest["dtype"]) for side in SIDES)

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
            if verify and not _is_whole(folder, file):
                raise RefusedError(f"{folder / file['name']} is missing or damaged (sha256): {_mend(folder)}")
        return cls(folder, manifest)


def keep_place(shards: Shards, run: Path) -> None:
    """Record in a run's folder where its shards lie and what they hold, and those of evaluate.also."""
    also = {"also": _place(shards.also)} if shards.also else {}
    atomic_io.write_checksummed(run / PLACE, {**_place(shards), **also, **shards.manifest})


def _place(shards: Shards) -> dict[str, Any]:
    place = {"folder": str(shards.folder), "absolute": str(shards.folder.resolve())}
    return {**place, "fingerprint": shards.fingerprint, "seen": shards.seen}


def of_run(run: Path, verify: bool | None = False) -> Shards:
    """The shards of a run, from any working folder and after both were moved together. RefusedError if not found.

    A relative path starts at the project, the folder whose runs/ holds the run.
    """
    kept = atomic_io.read_checksummed(run / PLACE)
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


def _is_whole(folder: Path, file: dict[str, Any]) -> bool:
    path = folder / file["name"]
    return path.is_file() and path.stat().st_size == file["bytes"] and atomic_io.sha256(path) == file["sha256"]


def _map(path: Path, file: dict[str, Any], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, Any, np.ndarray]:
    """Views of the file's tokens and of its documents' bounds (documents + 1,), the whole mapping, and the parts."""
    import pyarrow

    if not path.is_file() or path.stat().st_size != file["bytes"]:
        raise RefusedError(f"{path} is missing or is not {file['bytes']} bytes long: {_mend(path.parent)}")
    try:
        with pyarrow.memory_map(str(path)) as source:  # the buffer keeps the mapping alive, without the open file
            data = source.read_buffer()
        table = pyarrow.ipc.open_stream(data).read_all()
        column = table["tokens"].chunk(0)
        tokens, starts = _view(column.values), _view(column.offsets)
        parts = _view(table["parts"].chunk(0).values) if "parts" in table.column_names else np.empty(0, np.uint8)
    except (pyarrow.ArrowInvalid, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise RefusedError(f"{path} is damaged: {_mend(path.parent)}") from error
    if len(parts) not in (0, len(tokens)):
        raise RefusedError(f"{path} does not hold a part for each token: {_mend(path.parent)}")
    if tokens.dtype != dtype or len(tokens) != file["tokens"] or len(starts) != file["documents"] + 1:
        raise RefusedError(f"{path} does not hold the {file['tokens']} tokens of its manifest: {_mend(path.parent)}")
    return tokens, starts, data, parts


def _view(array: Any) -> np.ndarray:
    """An Arrow array as NumPy, without copying; its own `to_numpy` imports pandas."""
    dtype = np.dtype(str(array.type))
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def write(
    documents: Iterable[bytes],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    about: dict[str, Any],
    processes: int = 0,
    chat: bool = False,
) -> Iterator[int]:
    """Encode `documents` into shards in `folder`; yields the bytes of text done so far, step by step.

    They are conversations if `chat`.
    Files that an earlier, killed call finished are kept if they match its journal. `about` goes into the manifest. The
    caller holds the folder's lock and passes the same documents as in the earlier call. With 0 `processes`, this
    process encodes; the files are the same bytes for any number.
    """
    atomic_io.make_folder(folder)
    files = _finished(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    yield sum(file["text_bytes"] for file in itertools.chain(*files.values()))
    done = {side: sum(file["documents"] for file in files[side]) for side in SIDES}
    waiting: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for block in _encoded(_blocks(documents, val_fraction, done), tokenizer, dtype, processes, chat):
        side = block["side"]
        waiting[side].append(block)
        yield block["text_bytes"]
        if sum(each["text_bytes"] for each in waiting[side]) >= FILE:
            _write_file(folder, files, side, waiting[side])
            waiting[side] = []
    for side in SIDES:
        if waiting[side]:
            _write_file(folder, files, side, waiting[side])
    manifest = {"format": FORMAT, **about, "dtype": dtype.name, "files": files}
    atomic_io.write_checksummed(folder / "manifest.json", manifest)
    atomic_io.remove(folder / "journal.json")


def _finished(folder: Path) -> Files:
    """The files that match their entry in the journal; everything else in the folder is removed."""
    journal = folder / "journal.json"
    named: Files = atomic_io.read_json(journal) if journal.is_file() else {side: [] for side in SIDES}
    files = {side: list(itertools.takewhile(lambda file: _is_whole(folder, file), named[side])) for side in SIDES}
    kept = {journal.name, *(file["name"] for file in itertools.chain(*files.values()))}
    for path in folder.iterdir():
        if path.name not in kept:
            atomic_io.remove(path)
    return files


def _blocks(documents: Iterable[bytes], val_fraction: float, done: dict[str, int]) -> Iterator[Block]:
    """Blocks of documents of one side, about BLOCK bytes each, without the first `done` documents of each side."""
    gathered: dict[str, list[bytes]] = {side: [] for side in SIDES}
    size, skip = dict.fromkeys(SIDES, 0), dict(done)
    for document in documents:
        side = SIDES[is_validation(document, val_fraction)]
        if skip[side]:
            skip[side] -= 1
            continue
        gathered[side].append(document)
        size[side] += len(document)
        if size[side] >= BLOCK:
            yield _block(side, gathered[side])
            gathered[side], size[side] = [], 0
    yield from (_block(side, gathered[side]) for side in SIDES if gathered[side])


def _block(side: str, documents: list[bytes]) -> Block:
    return {"side": side, "text": b"".join(documents), "lengths": [len(document) for document in documents]}


def _encoded(
    source: Iterator[Block], tokenizer: Tokenizer, dtype: np.dtype, processes: int, chat: bool
) -> Iterator[Block]:
    """The blocks in order, each with `tokens`, the ids of its documents end to end, their `starts`, and `parts`."""
    datasets = lean_datasets()
    idle: SimpleQueue[LocalEncoder | ProcessEncoder | ConversationEncoder] = SimpleQueue()
    kind = ConversationEncoder if chat else ProcessEncoder if processes else LocalEncoder
    encoders = [kind(tokenizer, dtype) for _ in range(processes or (1 if chat else cores()))]
    for encoder in encoders:
        idle.put(encoder)

    def encode(table: Any) -> dict[str, Any]:
        encoder, text = idle.get(), table["text"][0].as_py()
        try:
            tokens, starts, *parts = encoder.encode(text, _view(table["lengths"].chunk(0).values))
        finally:
            idle.put(encoder)
        block = {"side": table["side"][0].as_py(), "text_bytes": len(text), "tokens": tokens, "starts": starts}
        return block | ({"parts": parts[0]} if parts else {})

    lengths = datasets.List(datasets.Value("int32"))
    columns = {"side": datasets.Value("string"), "text": datasets.Value("large_binary"), "lengths": lengths}
    rows = datasets.IterableDataset.from_generator(_Unhashed(source), features=datasets.Features(columns))
    try:
        if (
            tokenizer.by_words or chat
        ) and not processes:  # threads would fight for the interpreter's lock at each new word
            yield from map(encode, rows.with_format("arrow"))
            return
        # One block per thread keeps all cores busy; sentencepiece's own threads would wait for the slowest of them.
        with ThreadPoolExecutor(len(encoders)) as pool:
            waiting: deque[Future[dict[str, Any]]] = deque()
            for table in rows.with_format("arrow"):
                waiting.append(pool.submit(encode, table))
                if len(waiting) > len(encoders) + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        for encoder in encoders:
            encoder.close()


class _Unhashed:
    """A generator that `datasets` can pickle, as it wants to in order to hash it for a cache that is not used."""

    def __init__(self, source: Iterator[dict[str, Any]]) -> None:
        self._source = source

    def __call__(self) -> Iterator[dict[str, Any]]:
        return self._source

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()


def _write_file(folder: Path, files: Files, side: str, blocks: list[dict[str, Any]]) -> None:
    """Write these blocks as the side's next file, and name it in the journal."""
    import pyarrow

    tokens = np.concatenate([block["tokens"] for block in blocks])
    begins = np.cumsum([0] + [len(block["tokens"]) for block in blocks])
    starts = [block["starts"] + begin for block, begin in zip(blocks, begins[:-1], strict=True)]
    offsets = pyarrow.array(np.concatenate([*starts, begins[-1:]]), pyarrow.int32())
    columns = {"tokens": tokens}
    if "parts" in blocks[0]:
        columns["parts"] = np.concatenate([block["parts"] for block in blocks])
    lists = {name: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values)) for name, values in columns.items()}
    batch = pyarrow.record_batch(lists)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = memoryview(sink.getvalue())
    name = f"{side}-{len(files[side]):05d}.arrow"
    atomic_io.write_bytes(folder / name, data)
    size = {"text_bytes": sum(block["text_bytes"] for block in blocks), "bytes": len(data)}
    about = {"name": name, "documents": len(batch), "tokens": len(tokens), **size}
    files[side].append({**about, "sha256": hashlib.sha256(data).hexdigest()})
    atomic_io.write_json(folder / "journal.json", files)
