"""Counts of what a text holds, taken as its documents pass by: lengths, characters, markup, lines."""

import heapq
import re
import unicodedata
from collections import Counter

import numpy as np

from llm.insight.near_duplicates import Index

HELD_OUT = 1 << 20  # bytes that vocabularies and yardsticks are measured on
LONG_LINE = 10_000  # bytes
LINES = 1 << 18  # different lines that are counted; rarer ones give way
SHOWN = 3  # samples of each finding
WIDTH = 72  # characters of a sample
REPEATED, SHORT_LINE = 10, 20  # times, bytes: a line that comes so often and is no shorter is boilerplate
MARKUP = {  # each begins with a literal, which is searched for fast
    "HTML tags": re.compile(
        rb"</?(?i:a|abbr|article|b|big|blockquote|body|br|button|center|code|dd|div|dl|dt|em|font|footer|form|gallery|"
        rb"h[1-6]|head|header|hr|html|i|iframe|img|input|label|li|link|math|meta|nav|nowiki|ol|option|p|pre|ref|script|"
        rb"section|small|span|strong|style|sub|sup|svg|table|tbody|td|th|title|tr|u|ul)(?:\s[^<>\n]{0,500})?/?>"
    ),
    "HTML entities": re.compile(rb"&(?:#[0-9]{1,7}|#x[0-9a-fA-F]{1,6}|[a-zA-Z]{2,10}[0-9]{0,2});"),
    "wiki links": re.compile(rb"\[\[[^\[\]\n]{1,200}\]\]"),
    "wiki templates": re.compile(rb"\{\{[^{}\n]{1,300}\}\}"),
    "wiki quotes": re.compile(rb"'''[^'\n]{1,200}'''"),
    "wiki headings": re.compile(rb"\n==+[^=\n]{1,200}==+(?=\n)"),
    "URLs": re.compile(rb"https?://[^\s<>\"']{4,500}"),
}
_NEWLINE = ord("\n")


class Counts:
    """The counts that are kept while the documents pass by."""

    def __init__(self, val_fraction: float) -> None:
        self.val_fraction = val_fraction
        self.places: list[np.ndarray] = []  # of each document, its fraction: side and, nearly, its identity
        self.index = Index()
        self.sizes: list[np.ndarray] = []  # bytes of each document
        self.text_bytes = [0, 0]  # for training, held out
        self.lines = self.long_lines = self.longest_line = 0
        self.points = np.zeros(0x110000, np.int64)  # how often each character comes
        self.markup: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        self.boilerplate = Lines()
        self._held_out: list[tuple[float, int, bytes]] = []  # a heap of those with the least fractions
        self._held = self._seen = 0

    def add(self, documents: list[bytes], places: list[float]) -> None:
        """The next documents, and the fraction of each, which decides its side."""
        self.places.append(np.array(places))
        self.index.add(documents)
        self._sample(documents, places)
        self.sizes.append(np.fromiter(map(len, documents), np.int32, len(documents)))
        data = b"\n".join([b"", *documents, b""])
        text = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        points = np.bincount(text)
        self.points[: len(points)] += points
        self.points[_NEWLINE] -= len(documents) + 1
        self._add_lines(data)
        for name, pattern in MARKUP.items():
            for found in pattern.finditer(data):
                self.markup[name] += 1
                if self.markup[name] <= SHOWN:
                    self.samples.setdefault(name, []).append(_line_around(data, found.start(), found.end()))

    def _sample(self, documents: list[bytes], places: list[float]) -> None:
        for document, place in zip(documents, places, strict=True):
            self._seen += 1
            self.text_bytes[place < self.val_fraction] += len(document)
            if place < self.val_fraction:
                heapq.heappush(self._held_out, (-place, self._seen, document))
                self._held += len(document)
                while self._held > HELD_OUT and len(self._held_out) > 1:
                    self._held -= len(heapq.heappop(self._held_out)[2])

    @property
    def held_out(self) -> list[bytes]:
        """A sample of the held-out documents in their order, HELD_OUT bytes at most."""
        return [document for _, _, document in sorted(self._held_out, key=lambda each: each[1])]

    def _add_lines(self, data: bytes) -> None:
        block = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(block == _NEWLINE)
        begins, ends = ends[:-1] + 1, ends[1:]
        sizes = ends - begins
        self.lines += int(np.count_nonzero(sizes))
        for at in np.flatnonzero(sizes > LONG_LINE):
            self.long_lines += 1
            if self.long_lines <= SHOWN:
                begin = int(begins[at])
                sample = f"{sizes[at]:,} bytes: {data[begin : begin + 4 * WIDTH].decode(errors='ignore')}"
                self.samples.setdefault("long lines", []).append(sample)
        self.longest_line = max(self.longest_line, int(sizes.max(initial=0)))
        long = sizes >= SHORT_LINE
        self.boilerplate.add(data, begins[long], ends[long])

    @property
    def characters(self) -> int:
        return int(self.points.sum())

    def scripts(self) -> dict[str, float]:
        """The share of each script in all letters, by the first word of Unicode's names, largest first."""
        counts: Counter[str] = Counter()
        for point in np.flatnonzero(self.points):
            if unicodedata.category(each := chr(point))[0] == "L":
                counts[unicodedata.name(each, "unnamed").split()[0].split("-")[0].capitalize()] += int(
                    self.points[point]
                )
        whole = max(counts.total(), 1)
        return {{"Cjk": "Han"}.get(name, name): count / whole for name, count in counts.most_common()}


class Lines:
    """How often lines come, by their hash: of more than 2 LINES the rarer half gives way (lossy counting)."""

    def __init__(self) -> None:
        self.keys, self.counts, self.sizes = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.texts: dict[int, str] = {}
        self.bytes = 0

    def add(self, data: bytes, begins: np.ndarray, ends: np.ndarray) -> None:
        """Count the lines of a block between `begins` and `ends`."""
        self.bytes += len(data)
        if not len(begins):
            return
        hashes = (hash(data[begin:end]) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True))
        keys, first, counts = np.unique(
            np.fromiter(hashes, np.int64, len(begins)), return_index=True, return_counts=True
        )
        whole, at = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        old, new = at[: len(self.keys)], at[len(self.keys) :]
        all_counts, sizes = np.zeros((2, len(whole)), np.int64)
        all_counts[old] = self.counts
        all_counts[new] += counts
        sizes[old] = self.sizes
        sizes[new] = (ends - begins)[first]
        self.keys, self.counts, self.sizes = whole, all_counts, sizes
        for place in np.flatnonzero(all_counts[new] >= REPEATED)[:1000]:
            if len(self.texts) < 1 << 14:
                begin, end = int(begins[first[place]]), int(ends[first[place]])
                self.texts.setdefault(
                    int(keys[place]), data[begin : min(end, begin + 4 * WIDTH)].decode(errors="ignore")
                )
        if len(self.keys) > 2 * LINES:
            kept = np.sort(np.argpartition(self.counts, -LINES)[-LINES:])
            self.keys, self.counts, self.sizes = self.keys[kept], self.counts[kept], self.sizes[kept]

    def found(self) -> tuple[list[int], int, list[str]]:
        """How often each repeated line came, the bytes of all of them, and samples of those that take most room."""
        often = np.flatnonzero(self.counts >= REPEATED)
        room = self.counts[often] * self.sizes[often]
        texts = [self.texts.get(key, "") for key in self.keys[often].tolist()]
        ranked = sorted(zip((-room).tolist(), texts, self.counts[often].tolist(), strict=True))  # ties by their text
        samples = [f"{count:,} times: {text}" for _, text, count in ranked if text]
        return self.counts[often].tolist(), int(room.sum()), samples[:SHOWN]


def _line_around(data: bytes, begin: int, end: int) -> str:
    """The line of a match, from a few characters before it on."""
    start = max(data.rfind(b"\n", 0, begin + 1) + 1, begin - WIDTH // 3)
    return data[min(start, begin) : max(end, begin + WIDTH)].decode(errors="ignore").strip().split("\n")[0]
