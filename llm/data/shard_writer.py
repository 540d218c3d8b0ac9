"""Write token shards: documents in blocks, encoded in threads or processes or on several machines, gathered into files.

A file is finished once the journal names it; the manifest is written last and completes the folder.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from llm.base import atomic_io
from llm.data.documents import key_of
from llm.data.encoding import ConversationEncoder, LocalEncoder, ProcessEncoder
from llm.data.reuse import JOURNAL, KnownTokens, merged
from llm.data.shards import FORMAT, SIDES, Files, is_whole, view
from llm.data.sharing import Block, Shared
from llm.data.sources import lean_datasets
from llm.data.tokenizer import Tokenizer
from llm.distributed.threads import cores

FILE = 16 << 20  # bytes of text in a file, which are held in memory until it is written
BLOCK = 1 << 20  # bytes of text encoded at once: little memory, yet the overhead per block does not matter


def write(
    documents: Iterable[bytes],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    about: dict[str, Any],
    processes: int = 0,
    chat: bool = False,
    files: Files | None = None,
    begin: Sequence[int] | None = None,
    before: Sequence[int] = (0, 0),
    known: KnownTokens | None = None,
    shared: Shared | None = None,
    writes: bool = True,
) -> Iterator[int]:
    """Encode `documents` into shards in `folder`; yields the bytes of text done so far, step by step.

    With `chat` they are conversations. Files that an earlier, killed call finished are kept if they match its journal.
    `about` goes into the manifest. The caller holds the folder's lock and passes the same documents as in the earlier
    call. With 0 `processes`, this process encodes; the files are the same bytes for any number.

    `documents` may leave out the first `before` (train, validation) ones if all of these are in `files`, which
    `finished` returned, or are the first of `known`; the tokens of other `known` documents are copied too.

    Where the blocks are `shared` with other machines, all encode the documents after the first `begin`, even if this
    one has more of them in files, or writes none.
    """
    files = {side: [] for side in SIDES} if not writes else finished(folder) if files is None else files
    begin = counts(files) if begin is None else begin
    ahead = {side: there - start for side, there, start in zip(SIDES, counts(files), begin, strict=True)}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    yield sum(file["text_bytes"] for file in itertools.chain(*files.values()))
    waiting: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    source = _blocks(documents, val_fraction, begin, before, known)
    blocks = _encoded(shared.own(source) if shared else source, tokenizer, dtype, processes, chat, known)
    for block in shared.all(blocks) if shared else blocks:
        side = block["side"]
        if ahead[side] > 0:  # whole files of blocks
            ahead[side] -= len(block["starts"])
            continue
        yield block["text_bytes"]
        if not writes:
            continue
        waiting[side].append(block)
        if sum(each["text_bytes"] for each in waiting[side]) >= FILE:
            _write_file(folder, files, side, waiting[side])
            waiting[side] = []
    if not writes:
        return
    for side in SIDES:
        if waiting[side]:
            _write_file(folder, files, side, waiting[side])
    manifest = {"format": FORMAT, **about, "dtype": dtype.name, "files": files}
    atomic_io.write_checksummed(folder / "manifest.json", manifest)
    atomic_io.remove(folder / JOURNAL)


def finished(folder: Path) -> Files:
    """The files that match their entry in the journal; everything else in the folder is removed."""
    atomic_io.make_folder(folder)
    journal = folder / JOURNAL
    named: Files = atomic_io.read_json(journal) if journal.is_file() else {side: [] for side in SIDES}
    files = {side: list(itertools.takewhile(lambda file: is_whole(folder, file), named[side])) for side in SIDES}
    kept = {journal.name, *(file["name"] for file in itertools.chain(*files.values()))}
    for path in folder.iterdir():
        if path.name not in kept:
            atomic_io.remove(path)
    return files


def counts(files: Files) -> list[int]:
    """The documents in the files of each side."""
    return [sum(file["documents"] for file in files[side]) for side in SIDES]


def _blocks(
    documents: Iterable[bytes],
    val_fraction: float,
    done: Sequence[int],
    before: Sequence[int],
    known: KnownTokens | None,
) -> Iterator[Block]:
    """Blocks of documents of one side, about BLOCK bytes each, without the first `done` documents of each side."""
    blocks = [_Gathering(side, known) for side in SIDES]
    skip = [max(0, there - start) for there, start in zip(done, before, strict=True)]
    for side, (there, start) in enumerate(zip(done, before, strict=True)):
        for document in range(there, start):
            assert known is not None, "only known documents may lie before the first"
            if block := blocks[side].add_known(known.number(side, document)):
                yield block
    for text in documents:
        key = key_of(text)
        index = int(key / 2**64 < val_fraction)
        if skip[index]:
            skip[index] -= 1
            continue
        if block := blocks[index].add(text, key):
            yield block
    yield from filter(None, (side.rest() for side in blocks))


class _Gathering:
    """Gathers the documents of one side until they are a block."""

    def __init__(self, side: str, known: KnownTokens | None) -> None:
        self._side, self._known = side, known
        self._begin()

    def _begin(self) -> None:
        self._texts: list[bytes] = []  # empty for those added as known
        self._keys: list[int] = []
        self._sizes: list[int] = []
        self._numbers: list[int] = []
        self._bytes = 0

    def add(self, document: bytes, key: int, number: int = -1, size: int = 0) -> Block | None:
        self._texts.append(document)
        self._keys.append(key)
        self._sizes.append(size or len(document))
        self._numbers.append(number)
        self._bytes += self._sizes[-1]
        return self._block() if self._bytes >= BLOCK else None

    def add_known(self, number: int) -> Block | None:
        assert self._known is not None
        return self.add(b"", int(self._known.keys[number]), number, int(self._known.lengths[number]))

    def rest(self) -> Block | None:
        return self._block() if self._sizes else None

    def _block(self) -> Block:
        keys, sizes = np.array(self._keys, np.uint64), np.array(self._sizes, np.int32)
        numbers = np.array(self._numbers)
        if self._known is not None:
            numbers = np.where(numbers < 0, self._known.find(keys, sizes), numbers)
        new = [text for text, number in zip(self._texts, numbers.tolist(), strict=True) if number < 0]
        block = {"side": self._side, "text": b"".join(new), "lengths": [len(text) for text in new]}
        self._begin()
        return {**block, "keys": keys, "sizes": sizes, "numbers": numbers}


def _encoded(
    source: Iterator[Block],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    processes: int,
    chat: bool,
    known: KnownTokens | None,
) -> Iterator[Block]:
    """The blocks in order, each with `tokens`, the ids of its documents end to end, their `starts`, and `parts`."""
    datasets = lean_datasets()
    idle: SimpleQueue[LocalEncoder | ProcessEncoder | ConversationEncoder] = SimpleQueue()
    kind = ConversationEncoder if chat else ProcessEncoder if processes else LocalEncoder
    encoders = [kind(tokenizer, dtype) for _ in range(processes or (1 if chat else cores()))]
    for encoder in encoders:
        idle.put(encoder)

    def encode(table: Any) -> dict[str, Any]:
        block: dict[str, Any] = {name: view(table[name].chunk(0).values) for name in ("keys", "sizes", "numbers")}
        lengths = view(table["lengths"].chunk(0).values)
        encoded = {"tokens": np.empty(0, dtype), "starts": np.empty(0, np.int64)}
        if chat:
            encoded["parts"] = np.empty(0, np.uint8)
        if len(lengths):
            encoder = idle.get()
            try:
                encoded = dict(zip(encoded, encoder.encode(table["text"][0].as_py(), lengths), strict=True))
            finally:
                idle.put(encoder)
        block |= {"side": table["side"][0].as_py(), "text_bytes": int(block["sizes"].sum())}
        return block | merged(encoded, block.pop("numbers"), known)

    numbers = {"lengths": "int32", "keys": "uint64", "sizes": "int32", "numbers": "int64"}
    columns = {"side": datasets.Value("string"), "text": datasets.Value("large_binary")}
    columns |= {name: datasets.List(datasets.Value(kind)) for name, kind in numbers.items()}
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
    of_documents = {name: np.concatenate([block[f"{name}s"] for block in blocks]) for name in ("key", "size")}
    batch = pyarrow.record_batch({**lists, **{name: pyarrow.array(each) for name, each in of_documents.items()}})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = memoryview(sink.getvalue())
    name = f"{side}-{len(files[side]):05d}.arrow"
    atomic_io.write_bytes(folder / name, data)
    size = {"text_bytes": sum(block["text_bytes"] for block in blocks), "bytes": len(data)}
    about = {"name": name, "documents": len(batch), "tokens": len(tokens), **size}
    files[side].append({**about, "sha256": hashlib.sha256(data).hexdigest()})
    atomic_io.write_json(folder / JOURNAL, files)
