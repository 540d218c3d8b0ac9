"""Baselines without a network: bits per byte of gzip, xz and a byte 5-gram.

xz and the 5-gram see the training side first, as the model does; gzip looks only 32 KiB back.
"""

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.data import hf_tokenizer
from llm.data.shards import AnyShards, Split, of_run
from llm.data.tokenizer import Tokenizer

RECORD = "yardsticks.json"  # in a run's folder
CHUNK = 1 << 20  # tokens decoded at once
ORDER = 5  # bytes of a gram
MOST = 32 << 20  # bytes of training text to read: counting has to sort them


def of_validation(run: Path, on_begin: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The yardsticks of a run's validation side; measured once, after `on_begin`, then kept in its folder.

    Empty for a run without a validation side, and for conversations and several texts: the run's own figure is of
    answers alone, or weighs the texts by their shares. RefusedError or OSError where the prepared text is gone.
    """
    shards = of_run(run)
    if shards.is_chat or len(shards.sources) > 1:
        return {}
    if (path := run / RECORD).exists():
        try:
            kept = atomic_io.read_checksummed(path)
            if kept.get("fingerprint") == shards.fingerprint:
                return dict(kept["bits_per_byte"])
        except RefusedError:  # damaged: it is measured again
            pass
    if not shards.validation.text_bytes:
        return {}
    on_begin()
    tokenizer = hf_tokenizer.load(run / "tokenizer")
    text = b"".join(_chunks(shards.validation.verified(), tokenizer))
    found = yardsticks(training_text(shards, tokenizer), text)
    atomic_io.write_checksummed(path, {"fingerprint": shards.fingerprint, "bits_per_byte": found})
    return found


def training_text(shards: AnyShards, tokenizer: Tokenizer) -> bytes:
    """The end of the training side, at most MOST bytes."""
    parts: list[bytes] = []
    size = 0
    for part in _chunks(shards.train, tokenizer, backwards=True):
        parts.append(part)
        size += len(part)
        if size >= MOST:
            break
    return b"".join(reversed(parts))[-MOST:]


def _chunks(side: Split, tokenizer: Tokenizer, *, backwards: bool = False) -> Iterator[bytes]:
    """The text of a side in pieces, from its beginning or from its end."""
    bytes_of = list(map(tokenizer.bytes_of, range(tokenizer.vocab_size)))
    starts = range(0, side.tokens, CHUNK)
    for start in reversed(starts) if backwards else starts:
        yield b"".join(map(bytes_of.__getitem__, side.read(start, min(start + CHUNK, side.tokens)).tolist()))


def yardsticks(train: bytes, text: bytes) -> dict[str, float]:
    """Bits per byte of `text` by each baseline, after `train`."""
    train = train[-MOST:]
    return {
        "gzip": 8 * len(zlib.compress(text, 9)) / len(text),
        "xz": 8 * (_xz(train + text) - _xz(train)) / len(text),
        f"byte {ORDER}-gram": ngram_bits(train, text) / len(text),
    }


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=6))


def ngram_bits(train: bytes, text: bytes) -> float:
    """Bits of `text` under an n-gram model of `train`, interpolated as by Witten and Bell (1991).

    p_n(c | h) = (count(hc) + kinds(h) p_{n-1}(c | h')) / (count(h) + kinds(h)), from 1/256 on.
    """
    probability = np.full(len(text), 1 / 256)
    for length in range(1, ORDER + 1):
        grams, counts = np.unique(_codes(train, length), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        kinds = np.diff(first, append=len(grams))
        totals = np.add.reduceat(counts, first) if len(first) else counts
        seen = _codes(text, length)
        at = slice(len(text) - len(seen), None)  # the first bytes have no context of this length
        count, total, kind = _look(grams, counts, seen), *(_look(contexts, of, seen >> 8) for of in (totals, kinds))
        known = total > 0
        longer = (count + kind * probability[at]) / np.maximum(total + kind, 1)
        probability[at] = np.where(known, longer, probability[at])
    return float(-np.log2(probability).sum())


def _codes(data: bytes, length: int) -> np.ndarray:
    """Each run of `length` bytes as an integer: (len(data) - length + 1,) of int64."""
    values = np.frombuffer(data, np.uint8).astype(np.int64)
    codes = np.zeros(max(len(values) - length + 1, 0), np.int64)
    for at in range(length):
        codes = codes << 8 | values[at : at + len(codes)]
    return codes


def _look(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for a missing one. `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
