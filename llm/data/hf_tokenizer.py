"""Tokenizers of other people's models, through the library `tokenizers`; their files are kept unchanged.

The only module that imports tokenizers. Ids are exactly theirs: special tokens written in a text are recognised unless
their settings turn that off (`split_special_tokens`).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RefusedError, optional
from llm.data.tokenizer import MANIFEST, PROBES, SPACE, Tokenizer

FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
EXTRA_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OWN = (
    "extra_special_tokens",
    "model_specific_special_tokens",
)  # a model's own names, as transformers 4 and 5 save them


class HFTokenizer(Tokenizer):
    """Ids 0..vocab_size-1. Documents begin with `bos`, the model's token for a beginning, or else for an end.

    `vocab_size` is the model's and may exceed the tokenizer's pieces; the ids left over mean nothing.
    """

    def __init__(self, files: dict[str, bytes], *, bos: int, ends: Iterable[int], vocab_size: int, name: str) -> None:
        self._library = _opened(files, name)
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = _settings(files).get("split_special_tokens") is True
        named = [bos, *ends, max(self._library.get_vocab().values(), default=-1)]  # ids may have gaps
        if not all(isinstance(id, int) and 0 <= id < vocab_size for id in named):
            raise RefusedError(f"{name} has ids outside the model's {vocab_size} pieces")
        self.files, self.bos, self.vocab_size = files, bos, vocab_size
        self.ends = tuple(sorted({bos, *ends}))
        self.banned = tuple(id for id in range(vocab_size) if self._library.id_to_token(id) is None)
        self.symbols: list[int] = []
        self.by_words = False
        self._adds_space = False
        self._bytes = self._bytes_of_all()
        self._adds_space = b"".join(self._bytes[id] for id in self.encode("a")) == b" a"
        self.lossless = all(self.decode(self.encode(probe)) == probe for probe in PROBES)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the ids of a document."""
        return atomic_io.digest_of([self.files[FILE].decode(), self.bos, self.vocab_size])

    @cached_property
    def is_exact_bpe(self) -> bool:
        return False

    @property
    def is_portable(self) -> bool:
        return True

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        found = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text`, and the characters that each stands for: (tokens, 2), begin and end."""
        found = self._library.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    @property
    def chat_template(self) -> str | None:
        """The folder's chat template, in jinja; of several the default. RefusedError if it is not one."""
        given = self.files[TEMPLATE].decode() if TEMPLATE in self.files else _settings(self.files).get("chat_template")
        if isinstance(given, list):
            named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
            given = named.get("default")
        if given is not None and not isinstance(given, str):
            raise RefusedError(f"{EXTRA_FILES[0]} is damaged: its chat_template is no text")
        return given

    @cached_property
    def special_names(self) -> dict[str, str]:
        """The texts of the special tokens that a chat template may name."""
        about = _merged_settings(self.files)
        own = next((each for each in map(about.get, OWN) if each and isinstance(each, dict)), {})
        named = own | {name: about.get(name) for name in NAMED}
        contents = {name: _content(each) for name, each in named.items()}
        return {name: str(each) for name, each in contents.items() if each is not None}

    def piece(self, id: int) -> str:
        return str(self._library.id_to_token(int(id)) or "")

    def save(self, folder: Path, **about: Any) -> None:
        """Write their files unchanged, and a manifest with their digests and what they leave open."""
        digests = {name: atomic_io.digest_of(data.decode()) for name, data in self.files.items()}
        for name, data in self.files.items():
            atomic_io.write_bytes(folder / name, data)
        says = {"bos": self.bos, "ends": self.ends, "vocabulary": self.vocab_size}
        atomic_io.write_checksummed(folder / MANIFEST, {**about, **says, "files": digests})

    def _bytes_of_all(self) -> list[bytes]:
        """Bytes by id. Byte-level pieces write each byte as a letter; others write <0x..> and U+2581 for a space."""
        added = self._library.get_added_tokens_decoder()
        decoder = json.dumps(json.loads(self.files[FILE]).get("decoder"), ensure_ascii=False)
        byte_level, space = '"ByteLevel"' in decoder, SPACE if SPACE in decoder else " "
        letters = _byte_letters()
        table = []
        for id in range(self.vocab_size):
            piece = self.piece(id)
            if id in added:
                table.append(b"" if added[id].special else added[id].content.encode())
            elif byte_level:
                table.append(b"".join(letters.get(each, each.encode()) for each in piece))
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace(space, " ").encode())
        return table


def load(folder: Path) -> Tokenizer:
    """The tokenizer in a run's `folder`, trained here or borrowed. RefusedError if it is damaged."""
    if not (folder / FILE).is_file():
        return Tokenizer.load(folder / "tokenizer.model")
    manifest = atomic_io.read_checksummed(folder / MANIFEST)
    digests = {name: digest for name, digest in manifest["files"].items() if name in (FILE, *EXTRA_FILES)}
    data = {name: (folder / name).read_bytes() for name in digests if (folder / name).is_file()}
    for name, digest in digests.items():
        if name not in data or atomic_io.digest_of(data[name].decode(errors="replace")) != digest:
            raise RefusedError(f"{folder / name} is missing or damaged: its digest is not the recorded one")
    bos, ends, vocab_size = (manifest[name] for name in ("bos", "ends", "vocabulary"))
    return HFTokenizer(data, bos=bos, ends=ends, vocab_size=vocab_size, name=str(folder))


def borrow(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a model folder with this config.json. RefusedError if it cannot be used."""
    vocab_size = config["vocab_size"]
    files = {name: (folder / name).read_bytes() for name in (FILE, *EXTRA_FILES) if (folder / name).is_file()}
    for name, data in files.items():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise RefusedError(f"{folder / name} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    about = _merged_settings(files)
    if "auto_map" in about:
        raise RefusedError(f"{folder / EXTRA_FILES[0]} asks for code of its own (auto_map), which is not run here")
    generation = folder / "generation_config.json"
    stated = [config, atomic_io.read_json(generation) if generation.is_file() else {}]
    if not isinstance(stated[1], dict):
        raise RefusedError(f"{generation} is damaged: no settings of generation")

    def piece(name: str, id_of: Callable[[str], int | None]) -> list[int]:
        """The id of the tokenizer's bos or eos, in a list that is empty if there is none."""
        content = _content(about.get(f"{name}_token"))
        id = id_of(content) if isinstance(content, str) else None
        return [] if id is None else [id]

    def stated_ids(name: str) -> list[int]:
        """The ids of bos or eos in the model's configuration files."""
        values = [each.get(f"{name}_token_id") for each in stated]
        ids = [id for value in values if value is not None for id in (value if isinstance(value, list) else [value])]
        for id in ids:
            if type(id) is not int or not 0 <= id < vocab_size:
                raise RefusedError(f"{folder}: {name}_token_id = {id!r:.40} is no id of {vocab_size} pieces")
        return ids

    if FILE not in files:
        path = folder / "tokenizer.model"
        plain = Tokenizer.load(path)
        mend = f"put its {FILE} there too"
        if plain.vocab_size != vocab_size:
            raise RefusedError(f"{path} has {plain.vocab_size} pieces, the model {vocab_size}: {mend}")
        ids = {plain.piece(id): id for id in range(vocab_size)}
        starts = [*piece("bos", ids.get), *stated_ids("bos"), plain.bos]
        if starts[0] != plain.bos:
            raise RefusedError(f"{path} begins a text with piece {plain.bos}, the model with {starts[0]}: {mend}")
        return Tokenizer(plain.model, str(path), [*piece("eos", ids.get), *stated_ids("eos")] or plain.own_ends)
    library = _opened(files, str(folder / FILE))
    if getattr(library.model, "dropout", None):
        raise RefusedError(f"{folder / FILE} drops merges at random, so its ids change: set its dropout to null")
    added = library.get_added_tokens_decoder()
    known = {each.content for each in added.values()}
    if lost := [name for name in _names_added(files) if name not in known]:
        mend = "save the folder again with transformers 5 (AutoTokenizer), or remove the token from that file"
        raise RefusedError(f"{folder / FILE} lacks the added token {lost[0]!r:.60} that a file beside it names: {mend}")
    ends = [*piece("eos", library.token_to_id), *stated_ids("eos")]
    # A configuration may have inherited its family's ids, which are ordinary pieces in this tokenizer.
    special = [id for id in stated_ids("bos") if id in added and added[id].special]
    starts = [*piece("bos", library.token_to_id), *special, *ends]
    if not starts:
        raise RefusedError(f"{folder} names no piece for where a text begins or ends (bos_token, eos_token)")
    return HFTokenizer(files, bos=starts[0], ends=ends, vocab_size=vocab_size, name=str(folder / FILE))


def _names_added(files: dict[str, bytes]) -> list[str]:
    """The tokens that the files beside tokenizer.json name, which transformers adds where it lacks them."""
    keys = ("added_tokens_decoder", "additional_special_tokens", *OWN)
    values: list[Any] = [list(_settings(files, EXTRA_FILES[2])), list(map(_merged_settings(files).get, NAMED))]
    values += [_settings(files, name).get(key) for name in EXTRA_FILES[:2] for key in keys]
    lists = [list(each.values()) if isinstance(each, dict) else each for each in values]
    named = [each for some in lists if isinstance(some, list) for each in some]
    return [content for content in map(_content, named) if isinstance(content, str)]


def _content(token: Any) -> Any:
    """The text of a token as these files write it: alone, or with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def _merged_settings(files: dict[str, bytes]) -> dict[str, Any]:
    """Those of tokenizer_config.json, completed by special_tokens_map.json."""
    return _settings(files, EXTRA_FILES[1]) | _settings(files, EXTRA_FILES[0])


def _settings(files: dict[str, bytes], name: str = EXTRA_FILES[0]) -> dict[str, Any]:
    """The settings in tokenizer_config.json or a similar file. RefusedError if it is not a JSON object."""
    try:
        settings = json.loads(files.get(name, b"{}"))
        if isinstance(settings, dict):
            return settings
    except (ValueError, RecursionError):
        pass
    raise RefusedError(f"{name} is damaged: not JSON, or no settings of a tokenizer")


def _opened(files: dict[str, bytes], name: str) -> Any:
    library = optional("tokenizers", f"{name} is read with the package tokenizers: pip install -e '.[export]'")
    try:
        return library.Tokenizer.from_buffer(files[FILE])
    except Exception as error:  # the library raises nothing narrower
        raise RefusedError(f"{name} is damaged or of a kind that is not known here: {str(error)[:200]}") from error


def _byte_letters() -> dict[str, bytes]:
    """The byte of each letter in a byte-level piece: printable bytes stand for themselves, others start at U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
