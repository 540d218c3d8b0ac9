"""Text to token ids and back, with sentencepiece: train, encode, decode, fingerprint.

Vocabularies trained here are BPE with a piece for each byte and no normalisation, so every text comes back byte for
byte. They are trained with a fixed number of threads: the same text gives the same file. Since none of their pieces
crosses from one word into the next, a text is encoded word by word, and most words are found in a cache.
"""

import codecs
import hashlib
import io
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError, TextError
from llm.config.schema import MIN_VOCAB_SIZE

sentencepiece.set_min_log_level(3)  # errors are raised and reported here

# Turn markers of conversations: each has an id, and no text is ever encoded to one.
CONTROLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MANIFEST = "manifest.json"  # beside a .model of our own
SETTINGS = 2  # counts changes to the way vocabularies are trained
LINE = 4000  # bytes of a line in training: sentencepiece silently leaves out lines of more than 4,192
PART = 1 << 14  # characters encoded at once: the cost per character grows with the length
SPACE = "\u2581"  # a space inside sentencepiece's pieces
WORD = re.compile(r"\n| *[^ \n]+| +")  # a newline, or spaces and what follows: our pieces cross none
REMEMBERED = 200_000  # words in the cache: about 50 MB
LONGEST_WORD = 32  # characters of a word in the cache: longer ones seldom come again
MOST_CROSSING = 64  # pieces that cross into the next word; with more, the search for them costs more than it saves
PROBES = (
    "a", " a", "a ", "a\nb", "\n\n", "  a   b ", "\t\r\n", "\0", "A1234.5", "Ａﬁ①é e\u0301 ß", "한국어 漢字 ไทย עברית", 
    "🎉👩‍👩‍👧", "\ufeff\u200b\u2028\u00a0", "<s></s><unk><0x41>", f"a{SPACE}b {SPACE}", "\U0010ffff\ufffd")  # fmt: skip


class Tokenizer:
    """A sentencepiece vocabulary, ids 0..vocab_size-1. A document begins with `bos`, which `encode` does not add.

    A text ends before any of `ends`: `bos`, where the next document begins, and the end tokens of a borrowed model.
    """

    def __init__(self, model: bytes, name: str, ends: Iterable[int] = ()) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            if not model:  # sentencepiece takes it for an empty vocabulary
                raise RuntimeError
        except RuntimeError as error:
            raise RefusedError(f"{name} is damaged or no sentencepiece model: name another") from error
        self.model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.own_ends = [id for id in [self._processor.eos_id()] if id >= 0]
        starts = [id for id in [self._processor.bos_id(), *self.own_ends] if id >= 0]
        if not starts:
            raise RecipeError(
                f"{name} has no piece for where a document begins or ends: train it with bos_id, or name another"
            )
        self.bos: int = starts[0]
        self.ends = tuple(sorted({self.bos, *ends}))
        self.banned = tuple(id for id in range(self.vocab_size) if self._is_no_text(id))
        self._bytes = self._bytes_of_all()
        self._adds_space = b"".join(self._bytes[id] for id in self._processor.encode("a")) == b" a"
        self._sign = self._find_sign()
        # Order of ids in our own vocabularies: controls, symbols that are split off first, bytes, pieces by rank.
        bytes_at = [id for id in range(self.vocab_size) if self._processor.is_byte(id)]
        self.unknown: int = self._processor.unk_id()
        self.controls = [id for id in range(self.vocab_size) if self._processor.is_control(id)]
        self.symbols = [id for id in range(min(bytes_at, default=0)) if id not in (self.unknown, *self.controls)]
        self.first_piece = max(bytes_at, default=-1) + 1
        self._words, self._crossing = _Words(self._processor), self._find_crossing()
        self.by_words = False  # not before it is known to be exact
        self.lossless = all(self.decode(self.encode(probe)) == probe for probe in PROBES)
        self.by_words = self.is_exact_bpe and len(self._crossing) <= MOST_CROSSING

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a .model file. RefusedError if it is damaged or differs from its manifest, RecipeError if missing."""
        if not path.is_file():
            raise RecipeError(f"{path} is not there: name a sentencepiece .model")
        manifest = path.with_name(MANIFEST)
        says = atomic_io.read_checksummed(manifest) if manifest.is_file() else None
        if says is not None and says.get("sha256") != atomic_io.sha256(path):
            raise RefusedError(f"{path} is damaged: its sha256 is not the recorded one")
        return cls(path.read_bytes(), str(path), (says or {}).get("ends", ()))

    @classmethod
    def train(
        cls, documents: Sequence[bytes], *, vocab_size: int, terms: Sequence[str] = (), as_fits: bool = False
    ) -> "Tokenizer":
        """Train a lossless BPE vocabulary that keeps `terms` whole.

        TextError if the text does not allow this size; `as_fits` takes the nearest that it allows instead.
        """
        reserved = {"<s>", "<unk>", *CONTROLS}
        if taken := [term for term in terms if term in reserved or re.fullmatch("<0x[0-9A-F]{2}>", term)]:
            raise RecipeError(f"tokenizer.terms: {taken[0]} is the name of a piece of its own: leave it out")
        if odd := [term for term in terms if re.search(r"^ $|[\x00\u2581\ud800-\udfff]", term)]:
            raise RecipeError(
                f"tokenizer.terms: {odd[0]!a} cannot be a piece of its own (a space is one anyway; U+2581, which is a "
                f"space in pieces, U+0000 and surrogates are in none): leave it out"
            )
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(documents), model_writer=out, model_type="bpe", vocab_size=vocab_size,
                control_symbols=list(CONTROLS),
                user_defined_symbols=["\n", *dict.fromkeys(term.replace(" ", SPACE) for term in terms)],
                byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
                remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=-1,
                pad_id=-1, num_threads=4,
                required_chars=SPACE)  # else a space would be decoded as U+2581  # fmt: skip
        except RuntimeError as error:
            bound = re.search(r"value <= (\d+)|required_chars. \d+ vs (\d+)", str(error))
            nearest = int(bound[1] or 0) or 2 * int(bound[2]) if bound else 0  # many letters leave no room for others
            if as_fits and nearest >= MIN_VOCAB_SIZE:
                return cls.train(documents, vocab_size=nearest, terms=terms, as_fits=nearest > vocab_size)
            if most := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
                fits = f", or at most tokenizer.vocabulary={most[1]}" if int(most[1]) >= MIN_VOCAB_SIZE else ""
                raise TextError(
                    f"tokenizer.vocabulary = {vocab_size} is too large for so little text: use more text{fits}"
                ) from error
            if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
                raise TextError(
                    f"tokenizer.vocabulary = {vocab_size} is too small for the bytes and letters of this text: "
                    f"use at least tokenizer.vocabulary={least[1]}"
                ) from error
            raise TextError(f"no tokenizer can be trained with these tokenizer.terms on this text: {error}") from error
        return cls(out.getvalue(), "the new vocabulary")

    @cached_property
    def fingerprint(self) -> str:
        """Digest of pieces, scores, types and the ids of PROBES, which reveal all other settings."""
        sp, ids = self._processor, list(range(self.vocab_size))
        types = [[sp.is_unknown(id), sp.is_control(id), sp.is_byte(id), sp.is_unused(id)] for id in ids]
        pieces = [sp.id_to_piece(ids), [score.hex() for score in sp.get_score(ids)], types]
        return atomic_io.digest_of([pieces, self.bos, [sp.encode(probe) for probe in PROBES]])

    @cached_property
    def is_exact_bpe(self) -> bool:
        """True if pieces and their ranks alone decide the ids, as in vocabularies trained here."""
        scores = self._processor.get_score(list(range(self.first_piece, self.vocab_size)))
        return self.lossless and self._sign is not None and all(score == -rank for rank, score in enumerate(scores))

    @property
    def is_portable(self) -> bool:
        """True if tokenizer.json can express it."""
        return self.is_exact_bpe

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS."""
        return [int(id) for id in self.encode_batch([text], threads=1)[0]]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, without BOS: (tokens,) of int32 each."""
        alone = [self.by_words and not any(piece in text for piece in self._crossing) for text in texts]
        whole = iter(self._encode([text for text, words in zip(texts, alone, strict=True) if not words], threads))
        return [self._words.encode(text) if words else next(whole) for text, words in zip(texts, alone, strict=True)]

    def _encode(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """`encode_batch` by sentencepiece, without the cache of words."""
        if self._sign is None or not any(len(text) > PART or SPACE in text for text in texts):
            ids: list[np.ndarray] = self._processor.encode(texts, num_threads=threads, return_type="numpy")
            return ids
        parts = [_parts(text) for text in texts]
        flat = [each for some in parts for each in some]
        encoded = self._processor.encode(flat, num_threads=threads, return_type="numpy")
        whole = iter([self._sign if each == SPACE else ids for each, ids in zip(flat, encoded, strict=True)])
        return [np.concatenate([next(whole) for _ in some]) for some in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join([self._bytes[id] for id in ids]).decode(errors="replace")
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def piece(self, id: int) -> str:
        """The piece as stored in the vocabulary, with `▁` for a space."""
        return str(self._processor.id_to_piece(int(id)))

    def id_of(self, piece: str) -> int | None:
        """The id of a piece by its stored name, or None."""
        id = self._processor.piece_to_id(piece)
        return int(id) if id != self.unknown or piece == self.piece(self.unknown) else None

    def bytes_of(self, id: int) -> bytes:
        """The bytes of text that this id stands for; empty for controls such as BOS."""
        return self._bytes[id]

    def prefixes(self) -> list[int]:
        """For each piece the longest other piece that begins it, as ids; -1 where there is none.

        Both are whole characters, and each has one that is not white space: "Americ" is the prefix of "Americans".
        """
        texts = [self._bytes[id].decode(errors="replace") for id in range(self.vocab_size)]
        # A character may have a piece beside that of its byte, which is then never used: so bytes come first.
        bytes_first = sorted(range(self.vocab_size), key=lambda id: not self._processor.is_byte(id))
        ids = {texts[id]: id for id in bytes_first if id not in self.banned and "\ufffd" not in texts[id]}
        found = [-1] * self.vocab_size
        for text, id in ids.items():
            least = len(text) - len(text.lstrip()) + 1
            found[id] = next((ids[text[:end]] for end in range(len(text) - 1, least - 1, -1) if text[:end] in ids), -1)
        return found

    def has_pieces_of(self, other: "Tokenizer") -> bool:
        """True if each id but that of the unknown piece means the same in both, whatever library reads them."""
        if self.fingerprint == other.fingerprint:
            return True
        named = [[(each.bytes_of(id) or each.piece(id)) for id in range(each.vocab_size)] for each in (self, other)]
        unknown = {getattr(each, "unknown", None) for each in (self, other)}
        odd = {id for id, (mine, theirs) in enumerate(zip(*named, strict=False)) if mine != theirs}
        return (self.vocab_size, self.bos) == (other.vocab_size, other.bos) and odd <= unknown

    def save(self, folder: Path, **about: Any) -> None:
        """Write tokenizer.model, tokenizer.vocab for people (piece, tab, score) and a manifest."""
        ids = list(range(self.vocab_size))
        rows = zip(self._processor.id_to_piece(ids), self._processor.get_score(ids), strict=True)
        vocab = "".join(f"{piece}\t{score:g}\n" for piece, score in rows)
        atomic_io.write_bytes(folder / "tokenizer.model", self.model)
        atomic_io.write_bytes(folder / "tokenizer.vocab", vocab.encode())
        if self.ends != (self.bos,):
            about |= {"ends": self.ends}
        atomic_io.write_checksummed(folder / MANIFEST, {**about, "sha256": hashlib.sha256(self.model).hexdigest()})

    def _is_no_text(self, id: int) -> bool:
        """True if a model must never generate this id: unknown, unused, or a control that ends no text."""
        sp = self._processor
        return bool(sp.is_unknown(id) or sp.is_unused(id) or (sp.is_control(id) and id not in self.ends))

    def _bytes_of_all(self) -> list[bytes]:
        sp, ids = self._processor, list(range(self.vocab_size))
        table = [piece.replace(SPACE, " ").encode() for piece in sp.id_to_piece(ids)]
        for id in ids:
            if sp.is_byte(id):
                table[id] = bytes([int(sp.id_to_piece(id)[3:5], 16)])
            elif sp.is_control(id):
                table[id] = b""
            elif sp.is_unknown(id):
                table[id] = sp.decode([id]).encode()
        return table

    def _find_crossing(self) -> list[str]:
        """Strings that rule out encoding a text word by word: U+2581, and pieces with a space after a letter."""
        pieces = (self._processor.id_to_piece(id) for id in [*self.symbols, *range(self.first_piece, self.vocab_size)])
        return [SPACE, *(piece.replace(SPACE, " ") for piece in pieces if re.search(f"[^{SPACE}]{SPACE}", piece))]

    def _find_sign(self) -> np.ndarray | None:
        """The byte pieces of a literal U+2581, or None if this vocabulary cannot encode texts in parts."""
        sp = self._processor
        sign = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        newline = sp.piece_to_id("\n")
        alone = sum("\n" in sp.id_to_piece(id) for id in range(self.vocab_size)) == 1
        exact = sp.encode("a\n b") == [*sp.encode("a"), newline, *sp.encode(" b")] and sp.encode("\n") == [newline]
        return np.array(sign, np.int32) if alone and exact and all(map(sp.is_byte, sign)) else None


class _Words(dict[str, bytes]):
    """A cache of the ids of words, as bytes of int32; emptied when it is full."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._processor = processor

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(b"".join(map(self.__getitem__, WORD.findall(text))), np.int32)

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._processor.encode(word)).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


class TextStream:
    """Decodes ids one at a time; the joined text equals `decode` of all of them after a prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this id completes; bytes of an unfinished character are held back."""
        return self._decoder.decode(self._bytes_of(id))

    def flush(self) -> str:
        """The bytes held back, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _lines(documents: Iterable[bytes]) -> Iterator[str]:
    for document in documents:
        for line in re.split("[\n\t]", document.decode()):  # the trainer leaves out lines with a tab, its separator
            if len(line) * 4 <= LINE or len(line.encode()) <= LINE:
                yield line
            else:
                yield from (line[begin : begin + LINE // 4] for begin in range(0, len(line), LINE // 4))


def _parts(text: str) -> list[str]:
    """Split `text` into parts to encode separately: long text at line ends, and each literal U+2581."""
    parts = []
    for each in re.split(f"({SPACE})", text):
        begin = 0
        while len(each) - begin > PART and (end := each.find("\n", begin + PART) + 1):
            parts.append(each[begin:end])
            begin = end
        parts.append(each[begin:])
    return parts
