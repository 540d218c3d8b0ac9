"""Whatever bytes a person calls text: they are prepared without a loss, or refused in one line; never a traceback."""

import gzip
import json
import lzma
import re
import signal
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from llm.base.errors import LLMError
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.data.documents import Corpus
from llm.data.pipeline import Prepared, prepare_text
from llm.data.shards import Split
from llm.data.tokenizer import Tokenizer

SECONDS = 20  # for a small text: more is a hang

PIECES = st.sampled_from(
    [
        " ", "\n", "\r\n", "\r", "\t", "\n\n\n", "\x00", "\ufeff", "\u2581", "\u2028", "\x85", "\x0c", "\ufffd", "\U0010ffff",
        "a", "the sea ", "é" * 7, "漢字", "🎉👩‍👩‍👧", "e\u0301", "\u202e", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "<|endoftext|>\n",
        "\n = Title = \n", " = = Section = = ", "1234567890", "a" * 5000, "word " * 900, "\n" * 3000, '{"text": "x"}', '{"text": ', "[[[[[",
    ]
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.one_of(PIECES, st.text(max_size=60)), max_size=40).map(lambda parts: "".join(parts).encode(errors="replace")),
    st.lists(PIECES, min_size=5, max_size=30).map(lambda parts: ("".join(parts) * 40).encode()),
    st.binary(max_size=300),
    st.lists(st.one_of(PIECES.map(str.encode), st.binary(max_size=5)), max_size=30).map(b"".join),
    st.lists(st.fixed_dictionaries({"text": st.text(max_size=200)}), max_size=30).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
)  # fmt: skip
RULES = st.sampled_from(
    ["auto", "lines", "blocks", "headings", "blank-lines", "files", "marker <|endoftext|>", "marker a"]
)
NAMES = st.sampled_from(
    [
        *["text.txt"] * 4,
        "text.jsonl",
        "TEXT.NDJSON",
        "text.txt.gz",
        "packed.txt.gz",
        "packed.md.xz",
        "text.json",
        "text.csv",
    ]
)
PACK = {".gz": gzip.compress, ".xz": lzma.compress}


def texts_of(side: Split, tokenizer: Tokenizer) -> list[bytes]:
    ends = [*side.document_starts().tolist(), side.tokens]
    return [tokenizer.decode(side.read(begin + 1, end).tolist()).encode() for begin, end in pairwise(ends)]


def mended(path: Path) -> tuple[Recipe, Prepared | None]:
    """The text prepared, after doing what the errors say as long as they name a setting; None where they name none."""
    overrides: list[str] = []
    for _ in range(8):
        recipe = load(path, overrides)
        try:
            return recipe, prepare_text(recipe, lambda line: None)
        except LLMError as error:
            said = str(error)
            assert error.status == 2 and "\n" not in said and len(said) < 600, repr(error)
        setting = re.search(r"(?:tokenizer\.vocabulary|model\.context|text\.validation|text\.documents)=[\w.]+", said)
        if setting is None:
            return recipe, None
        overrides.append(setting[0])
        if setting[0].startswith("model.context"):
            overrides.append(f"train.tokens_per_step={setting[0].rpartition('=')[2]}")
    raise AssertionError(f"the mends go in a circle: {overrides}")


def one_text(data: bytes, name: str, rule: str) -> None:
    def hangs(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"hangs for {SECONDS} s")

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text = folder / name
        whole = PACK[text.suffix](data) if name.startswith("packed") else data
        text.write_bytes(whole)
        (folder / "recipe.yaml").write_text(
            f"text: {{files: [{text}], cache: {folder / 'cache'}, documents: {json.dumps(rule)}, validation: 0.2}}\n"
            "tokenizer: {vocabulary: 290}\n"
            "model: {context: 8}\ntrain: {steps: 1, tokens_per_step: 8}\n"
        )
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(SECONDS)
        try:
            recipe, prepared = mended(folder / "recipe.yaml")
            if prepared is None:
                return event("refused")
            again = prepare_text(recipe, lambda line: None, verify=True)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        event("prepared")
        assert again.shards.fingerprint == prepared.shards.fingerprint
        shards, tokenizer = prepared.shards, prepared.tokenizer
        found = texts_of(shards.train, tokenizer) + texts_of(shards.validation, tokenizer)
        cut = re.search(r"cut at ([\d,]+) bytes", shards.manifest["rule"])  # so that some can be held out
        corpus = Corpus(recipe.text, int(cut[1].replace(",", ""))) if cut else Corpus(recipe.text)
        assert Counter(found) == Counter(corpus.documents())
        assert text.read_bytes() == whole


@settings(deadline=None, max_examples=60, print_blob=True)
@given(TEXTS, NAMES, RULES)
@example(("\n\n\n\x0c\x85[[[[[\x85" * 40).encode(), "text.txt", "auto")  # of two tokens
@example(b"a" * 5000 + b"   ", "text.txt", "auto")  # whose spaces the tokenizer's trainer leaves out
def test_a_hostile_text_is_prepared_whole_or_refused_in_one_line(data: bytes, name: str, rule: str) -> None:
    one_text(data, name, rule)


@pytest.mark.slow
@settings(deadline=None, max_examples=300, print_blob=True)
@given(TEXTS, NAMES, RULES)
def test_300_hostile_texts_are_prepared_whole_or_refused_in_one_line(data: bytes, name: str, rule: str) -> None:
    one_text(data, name, rule)
