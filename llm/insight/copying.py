"""How much a sample copies from the training text, and how much it repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm.data.shards import Split
from llm.data.tokenizer import Tokenizer

GRAM = 8  # tokens
RUN = 12  # characters, which no two places of a short text share by chance
MOST = 1 << 26  # training tokens that are searched, the first ones
CHUNK = 1 << 20  # training tokens held at once
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Copying:
    """`longest`: the longest text that stands in the training text word for word, `tokens` long; `grams`: the share of
    the sample's runs of GRAM tokens that stand there."""

    longest: str
    tokens: int
    grams: float


def repetition(text: str) -> float:
    """The share of a text's runs of RUN characters that stood in it before."""
    runs = [text[at : at + RUN] for at in range(len(text) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def copying(samples: Sequence[str], train: Split, tokenizer: Tokenizer) -> list[Copying]:
    """How much each sample copies from the first MOST tokens of the training side.

    Runs of tokens are compared by 64-bit hashes. Only places where n tokens match are looked at for n + 1.
    """
    ids = [np.array(tokenizer.encode(text), np.int64) for text in samples]
    longest = max(map(len, ids), default=0)
    seen = [[np.zeros(max(len(each) - n + 1, 0), bool) for n in range(1, longest + 1)] for each in ids]
    sought = [[_hashes(each, n) for n in range(1, longest + 1)] for each in ids]
    known = [np.unique(np.concatenate([each[n] for each in sought])) for n in range(longest)]
    end = min(train.tokens, MOST)
    for start in range(0, end, CHUNK):
        text = train.read(start, min(start + CHUNK + longest, end)).astype(np.uint64)
        at, codes = np.arange(len(text)), np.zeros(len(text), np.uint64)
        for n in range(longest):
            fits = at + n < len(text)
            at, codes = at[fits], codes[fits] * FACTOR + text[at[fits] + n] + np.uint64(1)
            matching = _is_in(codes, known[n])
            at, codes = at[matching], codes[matching]
            if not len(at):
                break
            found = np.unique(codes)
            for flags, hashes in zip(seen, sought, strict=True):
                flags[n] |= _is_in(hashes[n], found)
    return [_summary(each, flags, tokenizer) for each, flags in zip(ids, seen, strict=True)]


def _summary(ids: np.ndarray, seen: list[np.ndarray], tokenizer: Tokenizer) -> Copying:
    tokens = max((n for n, flags in enumerate(seen, 1) if flags.any()), default=0)
    first = int(seen[tokens - 1].argmax()) if tokens else 0
    grams = seen[GRAM - 1] if len(seen) >= GRAM else np.zeros(0, bool)
    text = tokenizer.decode(ids[first : first + tokens].tolist())
    return Copying(text, tokens, float(grams.mean()) if len(grams) else 0.0)


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n ids: (len(ids) - n + 1,) of uint64."""
    codes = np.zeros(max(len(ids) - n + 1, 0), np.uint64)
    for at in range(n):
        codes = codes * FACTOR + ids[at : at + len(codes)].astype(np.uint64) + np.uint64(1)
    return codes


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each value is among the sorted `known` ones."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
