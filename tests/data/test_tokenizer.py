"""Every text comes back byte for byte, an id means the same wherever it is made, and what cannot be is one line."""

import io
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.errors import RecipeError, RefusedError, TextError
from llm.data import tokenizer as tokenization
from llm.data.sources import wiki_documents
from llm.data.tokenizer import CONTROLS, PART, PROBES, TextStream, Tokenizer
from tests.data.test_documents import needs_wiki

draw = random.Random(1)
WORDS = ["New York", "héé", "漢字", "1897", "the sea", *("".join(draw.choices("abdeiklnorst", k=4)) for _ in range(99))]
DOCUMENTS = [(" ".join(draw.choices(WORDS, k=60)) + "\n").encode() for _ in range(200)]
HOSTILE = [
    *PROBES, "", " ", "\n", "\r", "\x00\x01\x7f", "\u2581", "\u2581\u2581 \u2581", " \u2581\n", "a" * 50_000,
    "é\n" * 40_000, "x\u2581" * 3_000, "\u202eabc\u202c", "e\u0301\u0323", "ß ẞ ſ ﬃ ½ Å Å", "<unk>", "<s>", "<0x0A>",
    "\ud7ff\ue000\U00010000\U0010fffd", "\t\t  \t", "  \n  \n\n   ", "1234567890" * 9, "NewYork", " New  York ",
    "مرحبا بالعالم", "👨‍👩‍👧‍👦🇩🇪"]  # fmt: skip


MARKED = "".join(f"{control} {control}{control}\n<{control}>" for control in CONTROLS)  # text that spells the markers


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, vocab_size=330, terms=("New York", "Har", "a,b", 'q"'))


def trained(**settings: object) -> bytes:
    """A vocabulary as others train it."""
    out = io.BytesIO()
    lines = [document.decode().strip() for document in DOCUMENTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **({"vocab_size": 100} | settings)
    )
    return out.getvalue()


@pytest.mark.parametrize(
    "model",
    [
        None,
        {"model_type": "unigram"},
        {"byte_fallback": True, "vocab_size": 390},
        {"byte_fallback": True, "vocab_size": 390, "user_defined_symbols": ["#", "##", "#tag"]},
        {"add_dummy_prefix": False},
    ],
)
def test_a_prefix_is_the_longest_other_piece_that_begins_a_piece(
    tokenizer: Tokenizer, model: dict[str, object] | None
) -> None:
    found = tokenizer if model is None else Tokenizer(trained(**model), "theirs")
    prefixes = found.prefixes()
    assert len(prefixes) == found.vocab_size and all(-1 <= id < found.vocab_size for id in prefixes)
    texts = {id: found.bytes_of(id).decode(errors="replace") for id in range(found.vocab_size)}
    whole = {text for id, text in texts.items() if id not in found.banned and "\ufffd" not in text}
    seen = 0
    for id, prefix in enumerate(prefixes):
        text = texts[id]
        shorter = [text[:end] for end in range(1, len(text)) if text[:end].strip() and text[:end] in whole]
        if prefix >= 0:
            assert texts[prefix] == max(shorter, key=len) and prefix not in found.banned
            assert prefix == used(found, texts, texts[prefix]) and id == used(found, texts, text)
            seen += 1
        else:
            assert not shorter or text not in whole or prefixes[used(found, texts, text)] >= 0
    assert seen


def used(tokenizer: Tokenizer, texts: dict[int, str], text: str) -> int:
    """The piece of this text that is not the one of a byte, if there are two."""
    ids = [id for id, each in texts.items() if each == text]
    return next((id for id in ids if not re.fullmatch("<0x..>", tokenizer.piece(id))), ids[0])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.vocab_size for id in ids) and tokenizer.bos not in ids


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_whole_in_batches_and_in_streams(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [each.tolist() for each in tokenizer.encode_batch([text, "the sea", text], threads=2)][::2] == [ids, ids]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.feed, ids)) == text and stream.flush() == ""


@settings(deadline=None)
@given(st.lists(st.integers(0, 329)))
def test_a_stream_gives_what_decode_gives_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_holds_back_an_unfinished_character(tokenizer: Tokenizer) -> None:
    ids, stream = tokenizer.encode("🎉"), TextStream(tokenizer)
    assert [stream.feed(id) for id in ids] == ["", "", "", "🎉"]
    assert stream.feed(ids[0]) == "" and stream.flush() == "\ufffd"


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*CONTROLS, "<", "|", ">", "<|", "|>", "user", "end", " ", "\n", "a"]), max_size=40))
def test_no_text_yields_a_turn_marker_even_if_the_vocabulary_was_trained_on_them(pieces: list[str]) -> None:
    text = "".join(pieces)
    for vocabulary in (plain(), on_markers()):
        markers = [vocabulary.id_of(control) for control in CONTROLS]
        assert markers == [2, 3, 4, 5] and set(markers) <= set(vocabulary.banned)
        assert [vocabulary.piece(id) for id in markers] == list(CONTROLS)
        assert vocabulary.decode(markers) == ""
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text and not {*markers, vocabulary.bos} & {*ids}


@cache
def on_markers() -> Tokenizer:
    """A vocabulary trained on little else but the spelled markers."""
    return Tokenizer.train([MARKED.encode()] * 50 + DOCUMENTS[:20], vocab_size=330)


def test_long_text_has_the_ids_that_sentencepiece_gives_it_whole(tokenizer: Tokenizer) -> None:
    text = "".join(document.decode() for document in DOCUMENTS)
    assert len(text) > 3 * PART
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(text) == processor.encode(text)


LOSSLESS = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "user_defined_symbols": ["\n"]}  # fmt: skip
SCRAPS = st.sampled_from(
    [" ", "  ", "\n", "\t", "New", "York", "New York", " New  York", "Har", "the", " sea", "a,b", "1897", "é", "漢字", "\u2581",
     "\u3000", "\u00a0", "<s>", "🎉", "x" * 40, "ab ab", "ba"])  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(SCRAPS, st.text(st.characters(exclude_categories=["Cs"]), max_size=5))))
def test_remembered_words_have_the_ids_that_sentencepiece_gives_the_whole_text(scraps: list[str]) -> None:
    text = "".join(scraps)
    for tokenizer in (plain(), spaced(), joining()):
        assert tokenizer.by_words
        assert tokenizer.encode_batch([text], threads=1)[0].tolist() == tokenizer._encode([text], 1)[0].tolist()


@cache
def spaced() -> Tokenizer:
    """A vocabulary with terms that begin with a space, end with one, hold some, or are nothing else."""
    return Tokenizer.train(DOCUMENTS, vocab_size=330, terms=("New York", "the sea", "b ", " é", "  ", "ab  a"))


@cache
def joining() -> Tokenizer:
    """A vocabulary of others, of which a few pieces go on into the next word."""
    return Tokenizer(trained(split_by_whitespace=False, vocab_size=450, **LOSSLESS), "joining")


@cache
def plain() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, vocab_size=400)


def test_words_are_remembered_for_what_they_are_and_not_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "REMEMBERED", 10)
    tokenizer = Tokenizer(plain().model, "again")
    texts = [document.decode() for document in DOCUMENTS]
    for ids, whole in zip(tokenizer.encode_batch(texts, 2), tokenizer._encode(texts, 2), strict=True):
        assert np.array_equal(ids, whole)
    assert 0 < len(tokenizer._words) <= 10
    before = dict(tokenizer._words)
    tokenizer.encode("y" * 33)
    assert dict(tokenizer._words) == before  # too long to be worth it


def test_a_vocabulary_whose_pieces_join_words_is_asked_for_whole_texts() -> None:
    joining = Tokenizer(trained(split_by_whitespace=False, vocab_size=900, **LOSSLESS), "joining")
    assert joining.lossless and joining.is_exact_bpe and not joining.by_words
    assert Tokenizer(trained(vocab_size=600, **LOSSLESS), "apart").by_words
    assert not Tokenizer(trained(), "unigram").by_words


@needs_wiki
@pytest.mark.parametrize(
    "language", ["en-us", *(pytest.param(language, marks=pytest.mark.slow) for language in ("fr-fr", "es-es"))]
)
def test_every_packaged_document_comes_back(language: str) -> None:
    documents = list(wiki_documents(language))
    tokenizer = Tokenizer.train(documents[::5], vocab_size=2048)
    encoded = tokenizer.encode_batch([document.decode() for document in documents], threads=2)
    assert all(tokenizer.decode(ids).encode() == text for ids, text in zip(encoded, documents, strict=True))
    whole = tokenizer._encode([document.decode() for document in documents], threads=2)
    assert tokenizer.by_words and all(map(np.array_equal, encoded, whole))


def test_terms_stay_whole(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(id) for id in tokenizer.encode('in New York, Harx a,b q"')]
    assert {"New\u2581York", "Har", "a,b", 'q"'} <= set(pieces)


def test_the_same_text_gives_the_same_file_and_another_text_another_fingerprint(tmp_path: Path) -> None:
    one, two = (Tokenizer.train(DOCUMENTS, vocab_size=320) for _ in range(2))
    other = Tokenizer.train(DOCUMENTS[:50], vocab_size=320)
    one.save(tmp_path)
    assert one.model == two.model and one.fingerprint == two.fingerprint != other.fingerprint
    again = Tokenizer.load(tmp_path / "tokenizer.model")
    assert again.fingerprint == one.fingerprint and again.lossless and again.vocab_size == 320
    lines = (tmp_path / "tokenizer.vocab").read_text(encoding="utf-8").split("\n")
    assert lines[1] == "<s>\t0" and len(lines) == 322  # one for each piece; the newline's own piece breaks its line


def test_the_fingerprint_is_over_the_meaning_and_not_over_the_file() -> None:
    settings = {"model_type": "bpe", "vocab_size": 200}
    one, two = (Tokenizer(trained(num_threads=threads, **settings), "x") for threads in (1, 2))
    assert one.model != two.model and one.fingerprint == two.fingerprint
    assert Tokenizer(trained(add_dummy_prefix=False, **settings), "x").fingerprint != one.fingerprint


def test_a_vocabulary_of_others_is_used_and_known_to_lose_text() -> None:
    plain = Tokenizer(trained(), "plain")
    assert not plain.lossless and plain.bos == 1 and plain.decode(plain.encode("the sea")) == "the sea"
    no_bos = Tokenizer(trained(bos_id=-1, byte_fallback=True, vocab_size=380), "no bos")
    assert no_bos.piece(no_bos.bos) == "</s>"
    with pytest.raises(RecipeError, match="bos_id"):
        Tokenizer(trained(bos_id=-1, eos_id=-1), "neither")


@pytest.mark.parametrize("documents", [DOCUMENTS[:3], ["一二三四五六七八".encode()], [b"\t\t", b"ab ab ab"]])
def test_too_little_text_says_the_largest_vocabulary_that_fits(documents: list[bytes]) -> None:
    with pytest.raises(TextError, match="so little text") as raised:
        Tokenizer.train(documents, vocab_size=5000)
    fits = int(re.findall(r"tokenizer.vocabulary=(\d+)", str(raised.value))[0])
    assert Tokenizer.train(documents, vocab_size=fits).vocab_size == fits
    with pytest.raises(TextError, match=f"at most tokenizer.vocabulary={fits}"):
        Tokenizer.train(documents, vocab_size=fits + 1)


def test_a_vocabulary_as_fits_has_as_many_pieces_as_the_text_allows() -> None:
    few = Tokenizer.train(DOCUMENTS[:3], vocab_size=5000, as_fits=True)
    assert few.vocab_size < 5000 and few.decode(few.encode("the sea")) == "the sea"
    letters = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)).encode() * 9 for i in range(40)]
    many = Tokenizer.train(letters, vocab_size=1024, as_fits=True)
    assert many.vocab_size > 1024 + 600, "room for more than the letters"
    with pytest.raises(TextError, match=r"use more text$"):
        Tokenizer.train([b"a"], vocab_size=5000, as_fits=True)


def test_text_that_allows_no_vocabulary_is_told_of_none() -> None:
    with pytest.raises(TextError, match=r"use more text$"):
        Tokenizer.train([b"a"], vocab_size=5000)


def test_too_small_a_vocabulary_says_the_smallest_that_fits() -> None:
    letters = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)).encode() for i in range(10)]
    with pytest.raises(TextError, match="too small") as raised:
        Tokenizer.train(letters, vocab_size=300)
    fits = int(re.findall(r"tokenizer.vocabulary=(\d+)", str(raised.value))[0])
    assert Tokenizer.train(letters, vocab_size=fits).vocab_size == fits


def test_a_term_that_cannot_be_a_piece_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"tokenizer\.terms: <s>"):
        Tokenizer.train(DOCUMENTS, vocab_size=320, terms=("Har", "<s>"))
    with pytest.raises(RecipeError, match=r"tokenizer\.terms: <\|end\|>"):
        Tokenizer.train(DOCUMENTS, vocab_size=320, terms=("Har", "<|end|>"))


@pytest.mark.parametrize(
    "terms", [(" ",), ("\u2581",), (" ", "\u2581"), (" a", "\u2581a"), ("a\u2581b",), ("a\0",), ("\ud800",)]
)
def test_a_term_that_no_vocabulary_can_keep_whole_is_named(terms: tuple[str, ...]) -> None:
    with pytest.raises(
        RecipeError, match=r"^tokenizer\.terms: '[ -~]+' cannot be a piece of its own .*: leave it out$"
    ):
        Tokenizer.train(DOCUMENTS, vocab_size=320, terms=terms)


def test_long_lines_and_tabs_are_not_left_out_of_training() -> None:
    tokenizer = Tokenizer.train([b"river " * 10_000, b"sea\twind\n" * 50], vocab_size=284)
    assert len(tokenizer.encode(" river")) == len(tokenizer.encode("wind")) == 1


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(trained()[:200])
    with pytest.raises(RefusedError, match="damaged"):
        Tokenizer.load(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(b"")
    with pytest.raises(RefusedError, match="damaged"):
        Tokenizer.load(tmp_path / "b.model")
    with pytest.raises(RecipeError, match="is not there"):
        Tokenizer.load(tmp_path / "c.model")


def test_batches_are_of_small_integers(tokenizer: Tokenizer) -> None:
    assert [each.dtype for each in tokenizer.encode_batch(["a", "", "\u2581"], threads=1)] == [np.int32] * 3
