"""A text in any of its forms comes back byte for byte, a folder is a text, and each fault is one line that names a file."""

import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.base.errors import RecipeError, TextError
from llm.config.schema import Text
from llm.data import rows, text_files
from llm.data.documents import Corpus
from llm.prepare import list_text, main, write_wiki
from tests.data.test_documents import needs_wiki
from tests.forks import write_recipe, write_text
from tests.test_hostile import PIECES

TOUGH = [
    "é漢字🎉\u2581\u2028\x85\x0c\ufffd\U0010ffff", 'with "quotes", commas\tand tabs;', "a\r\nb\rc\n\nd\n", "\ufeffmark", "x" * 200_000,
    '{"text": "no row"}', "[[[[[", "text", " = T = ", "<|endoftext|>", "</s>\n", "'", '"', '""', "\\", "\\n", " a ", "1234567890"]  # fmt: skip
TEXTS = st.lists(
    st.one_of(st.sampled_from(TOUGH), PIECES, st.text(max_size=60)).filter(lambda text: "\0" not in text),
    min_size=1,
    max_size=12,
)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress}


def as_table(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, out, row_group_size=5)
    return out.getvalue()


ROWS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": lambda texts: "\n".join(json.dumps({"text": text}) for text in texts).encode(),
    ".json": lambda texts: json.dumps([{"id": [1, {}], "text": text} for text in texts], indent=1).encode(),
    ".JSON": lambda texts: json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode(),
    ".csv": lambda texts: as_table(texts, ","),
    ".CSV": lambda texts: as_table(texts, ";"),
    ".tsv": lambda texts: as_table(texts, "\t"),
    ".parquet": as_parquet,
}


def read(*paths: Path | str, notes: Counter[str] | None = None, **given: str) -> list[bytes]:
    return list(Corpus(Text(files=tuple(map(str, paths)), **given)).documents(notes))


def kept(texts: list[str]) -> list[bytes]:
    return [text.encode() for text in texts if text and not text.isspace()]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_every_form_come_back_byte_for_byte(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACKED[packed](ROWS[kind](TOUGH)))
    assert read(path) == kept(TOUGH)


@settings(deadline=None, max_examples=100)
@given(texts=TEXTS, kind=st.sampled_from(list(ROWS)), chunk=st.sampled_from([1, 2, 7, 1 << 20]))
def test_hostile_rows_come_back_wherever_the_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], kind: str, chunk: int
) -> None:
    texts = [text.encode(errors="replace").decode()[:3000] for text in texts]
    path = tmp_path_factory.mktemp("rows") / f"a{kind}"
    path.write_bytes(ROWS[kind](texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK", chunk)
        assert read(path) == kept(texts)


@pytest.mark.parametrize("kind", ["plain", "mark", "utf-16", "big"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_plain_text_comes_back_byte_for_byte(tmp_path: Path, suffix: str, packed: str, kind: str) -> None:
    text = "".join(each for each in TOUGH if not each.startswith("\ufeff"))
    data = text.encode("utf-16-be" if kind == "big" else "utf-16" if kind == "utf-16" else "utf-8")
    mark = b"\xfe\xff" if kind == "big" else b"\xef\xbb\xbf" if kind == "mark" else b""
    (tmp_path / f"a{suffix}{packed}").write_bytes(PACKED[packed](mark + data))
    notes: Counter[str] = Counter()
    assert b"".join(read(tmp_path / f"a{suffix}{packed}", notes=notes, documents="files")) == text.encode()
    said = {"plain": [], "mark": ["byte order marks left out"]}.get(kind, ["UTF-16 files read"])
    assert list(notes) == said


@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz"])
def test_packed_files_of_several_members_are_read_to_their_end(tmp_path: Path, packed: str) -> None:
    pack, path = PACKED[packed], tmp_path / f"a.txt{packed}"
    members = [f"member {number}\n".encode() * 50_000 for number in range(4)]
    whole = b"".join(map(pack, members))
    path.write_bytes(whole)
    assert b"".join(read(path, documents="files")) == b"".join(members)
    damaged = pack(members[0]) + b"\1" + pack(members[1])[1:]
    for data in (whole[:-3], whole[:-30], damaged, whole + b"plain text"):
        path.write_bytes(data)
        with pytest.raises(TextError, match=rf"a\.txt\{packed} is damaged .*compress it again"):
            read(path)


def test_a_large_packed_file_and_a_large_array_need_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"text": "some words of a row " * 400})
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(f"[{','.join([row] * 10_000)}]".encode(), preset=0))  # 80 MB
    code = """if True:
        import resource, sys
        from llm.data.documents import Corpus
        from llm.config.schema import Text
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(sum(1 for _ in Corpus(Text(files=(sys.argv[1],))).documents()))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "a.json.xz"], capture_output=True, text=True)
    documents, memory = map(int, ended.stdout.split())
    assert documents == 10_000 and memory < 40 << 10  # KiB


def test_conversations_may_lie_in_an_array_or_in_parquet(tmp_path: Path) -> None:
    said = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    (tmp_path / "a.json").write_text(json.dumps(said))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(said), tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.json")) == 3 and read(tmp_path / "a.json") == read(tmp_path / "a.parquet")


def test_a_row_whose_text_is_null_is_left_out_and_counted(tmp_path: Path) -> None:
    texts = [None, "a", None, "b"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("a.parquet", "a.json", "a.jsonl"):
        notes: Counter[str] = Counter()
        assert read(tmp_path / name, notes=notes) == [b"a", b"b"] and notes == {"rows without a text left out": 2}


def folder(path: Path) -> Path:
    """Notes as people keep them."""
    texts = {
        "b.md": b"b", "a.txt": b"a", "deep/er/c.csv": b"id,text\n1,c\n", "deep/d": b"d", "z.jsonl": b'{"text": "z"}',
        "README.rst.gz": gzip.compress(b"r"), "wide.txt": "w".encode("utf-16"), "code.py": b"print()",
    }  # fmt: skip
    others = {
        "photo.png": b"\x89PNG\r\n\x1a\n\0\0\xff", "scan.pdf": b"%PDF-1", "empty.txt": b"", "table.csv": b"a,b\n1,2\n",
        "package.json": b'{"name": "x"}', "log.jsonl": b'{"step": 1}\n', "photo.gz": gzip.compress(b"\x89PNG\r\n\0\0\xff"),
        ".hidden.txt": b"h", ".git/x.txt": b"x", os.fsdecode(b".\xff"): b"h",
    }  # fmt: skip
    for name, data in (texts | others).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / "gone.txt").symlink_to("nowhere")
    return path


def test_a_folder_is_a_text_and_what_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Corpus(Text(files=(f"{folder(tmp_path / 'notes')}/",)))
    assert list(found.documents()) == [b"r", b"a", b"b", b"print()", b"d", b"c", b"w", b"z"]  # sorted by name
    left = {Path(name).name: reason for name, reason in found.left_out}
    named = {"photo.png", "scan.pdf", "empty.txt", "table.csv", "package.json", "gone.txt", "log.jsonl", "photo.gz"}
    assert left.keys() == named
    assert left["photo.png"] == "is no text" and "text.field = 'text'" in left["table.csv"]
    list_text(Text(files=(str(tmp_path / "notes"),)))
    said = capsys.readouterr().out
    assert re.search(r"^ +1 +1  \S+/deep/er/c\.csv$", said, re.M) and "photo.png (left out: it is no text)" in said
    assert "wide.txt (UTF-16 files read: 1)" in said and re.search(r"^ +8 +14  16 files$", said, re.M)


def test_the_list_names_every_file_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1") * 9)
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n{"text": 1}')
    (tmp_path / "d.json").write_text('[{"te')
    with pytest.raises(TextError, match="3 of 4 files are refused"):
        list_text(Text(files=(str(tmp_path),)))
    said = capsys.readouterr().out.splitlines()
    assert (
        "a.txt (refused: " in said[1] and "iconv" in said[1] and said[2].split() == ["1", "2", str(tmp_path / "b.txt")]
    )
    assert "c.jsonl (refused: " in said[3] and "line 2" in said[3] and "d.json (refused: " in said[4]


def test_the_list_names_the_files_of_all_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "b"}]}\n')
    sources = [f"text.sources.{name}.{key}" for name, key in (("a", "files=a.txt"), ("c", "files=c.jsonl"))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("text: {files: [a.txt, c.jsonl]}\ntrain: {steps: 1}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(TextError, match=r"give each a place of its own in text\.sources"):
            main([str(recipe), "--list"])
        main([str(recipe), "--list", *sources, "text.sources.a.weight=1", "text.sources.c.weight=1"])
    said = [line.split()[2:] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert said == [["a.txt"], ["c.jsonl"], ["2", "files"]]


def test_a_project_whose_folder_is_the_text_does_not_read_its_own_runs_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "notes.txt")
    for name in (".", "data"):
        recipe = write_recipe(tmp_path, tmp_path / "notes.txt", **{"text.files": f"[{name}]", "text.cache": "data"})
        (tmp_path / "data/texts").mkdir(parents=True, exist_ok=True)
        write_text(tmp_path / "data/texts/own.txt", documents=70)
        (tmp_path / "runs/tiny").mkdir(parents=True, exist_ok=True)
        for own in ("lock", "status.json", "README.md"):
            (tmp_path / "runs/tiny" / own).write_text("no text")
        main([str(recipe)])
        found = Corpus(Text(files=(name,)))
        of_project = ["data/texts/own.txt", *(["notes.txt", "recipe.yaml"] if name == "." else [])]
        assert [source.name for source in found.sources] == of_project and found.left_out == []


def test_a_folder_may_be_deep(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1100):
        deep = deep / "d"
        deep.mkdir()
    (deep / "a.txt").write_text("a")
    try:
        assert read(tmp_path) == [b"a"]
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # Python's own removal recurses


def looped(path: Path) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "deep/back").symlink_to("..")


def itself(path: Path) -> None:
    path.mkdir()
    (path / "me.txt").symlink_to("me.txt")


def odd_name(path: Path) -> None:
    path.mkdir()
    (path / os.fsdecode(b"na\xffme.txt")).write_text("a")


def outside(path: Path) -> None:
    """A link to the folder around the text."""
    path.mkdir()
    (path / "up").symlink_to("..")


def of_numbers(path: Path) -> None:
    path.mkdir()
    (path / "a.csv").write_text("id,size\n1,2\n")


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def table(**columns: object) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def twice(path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), path)


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a loop of links": ("notes", looped, "deep/back is a link to a folder that it lies in"),
    "a link around": ("notes", outside, "notes/up is a link to a folder that it lies in"),
    "tables alone": ("notes", of_numbers, "is a folder without any text"),
    "a link to itself": ("notes", itself, "me.txt cannot be reached"),
    "a name that is not UTF-8": ("notes", odd_name, r"na\udcffme.txt has a name that is not UTF-8: rename it"),
    "no such column": ("a.csv", write(b"id,body\n1,a\n"), "no column text.field = 'text' in its first row (id,body)"),
    "no such column of Parquet": ("a.parquet", table(id=[1], body=["a"]), "text.field = 'text' (id, body): name another"),
    "numbers in Parquet": ("a.parquet", table(text=[1, 2]), "has int64 in its column text, not text"),
    "bytes in Parquet": ("a.parquet", table(text=[b"a"]), "has binary in its column text"),
    "no Parquet": ("a.parquet", write(b"text\na\n"), "is damaged or no Parquet file"),
    "no column of Parquet": ("a.parquet", table(), "no column text.field = 'text' (no other either)"),
    "two columns": ("a.csv", write(b"text,text\na,b\n"), "has 2 columns text: rename all but one of them"),
    "two columns of Parquet": ("a.parquet", twice, "has 2 columns text"),
    "half of Parquet": ("a.parquet", write(as_parquet(TOUGH)[:-100]), "is damaged or no Parquet file"),
    "a short row": ("a.csv", write(b"id,text\n1,a\n2\n"), "a.csv line 3 ends a row of 1 columns, the first row has 2"),
    "an open quote": ("a.csv", write(b'id,text\n1,"a\n2,b\n'), "is damaged (unexpected end of data)"),
    "a damaged quote": ("a.tsv", write(b'id\ttext\n1\t"a"b\n'), "line 2 is damaged"),
    "an object": ("a.json", write(b'{"text": "a"}'), "is not a JSON array"),
    "half an array": ("a.json", write(b'[{"text": "a"}, {"te'), "row 2 is not JSON"),
    "an open array": ("a.json", write(b'[{"text": "a"}'), "row 2 is not JSON (',' expected)"),
    "two arrays": ("a.json", write(b'[{"text": "a"}][]'), "goes on after its array"),
    "a deep array": ("a.json", write(b"[" * 300_000), "row 1 is not JSON"),
    "rows of another kind": ("a.json", write(b'[{"text": "a"}, 3]'), "row 2 has no text"),
    "encodings mixed": ("a.csv", write("id,text\n1,é\n".encode() + "2,é\n".encode("cp1252")), "not UTF-8 at byte 15"),
    "encodings mixed in UTF-16": ("a.txt", write("a\n".encode("utf-16") + b"plain"), "is damaged UTF-16 at byte 10"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_line_with_the_file_and_status_2(tmp_path: Path, case: str) -> None:
    name, make, words = BAD[case]
    make(tmp_path / name)
    with pytest.raises(TextError) as raised:
        read(tmp_path / name)
    said = str(raised.value)
    assert raised.value.status == 2 and words in said and str(tmp_path / name) in said and len(said) < 500
    assert said.isprintable()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", PACKED)
def test_reading_begins_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, packed: str
) -> None:
    """As it goes on behind the part of a text that was read before; of a plain file nothing before is read again."""
    text = "é漢字🎉\r\n" * 9 + "the end"
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACKED[packed](text.encode(encoding)))
    monkeypatch.setattr(text_files, "CHUNK", 7)
    identity, read = text_files.identity(path, path.stat()), []
    feed = text_files._Utf8Check.feed

    def counted(self: text_files._Utf8Check, chunk: bytes) -> bytes:
        read.append(len(chunk))
        return feed(self, chunk)

    monkeypatch.setattr(text_files._Utf8Check, "feed", counted)
    for begin in range(len(text.encode()) + 2):
        read.clear()
        rest = b"".join(text_files.read_from(path, identity, Counter(), begin))
        assert rest == text.encode()[begin:]
        assert begin == 0 or packed or encoding == "utf-16" or sum(read) <= len(rest)
    path.write_bytes(b"\n".join([b"one", b"two", b"\xff"]))
    if encoding == "utf-8" and not packed:
        with pytest.raises(TextError, match="not UTF-8 at byte 8"):
            list(text_files.read_from(path, text_files.identity(path, path.stat()), Counter(), 4))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.txt.zst", "a.txt.xz"])
def test_a_file_that_grows_while_it_is_read_is_named(tmp_path: Path, name: str) -> None:
    path, kind = tmp_path / name, "." + name.partition(".")[2]
    texts = [str(number) * 2000 for number in range(1000)]
    path.write_bytes(ROWS[kind](texts) if kind in ROWS else PACKED[path.suffix]("\n".join(texts).encode()))
    documents = Corpus(Text(files=(str(path),))).documents()
    next(documents)
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(TextError, match=f"{re.escape(name)} changed while it was read"):
        list(documents)


def test_a_row_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW", 1 << 20)
    for kind in (".json", ".csv"):
        (tmp_path / f"a{kind}").write_bytes(ROWS[kind](["a" * (4 << 20)]))
        with pytest.raises(TextError, match=r"of more than 1 MiB|field larger than field limit"):
            read(tmp_path / f"a{kind}")


def test_a_damaged_row_of_a_large_array_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW", 1 << 20)
    whole = [{"text": "a" * 1000}] * 4000
    (tmp_path / "large.json").write_text('[{"text": "a\nb"},' + json.dumps(whole)[1:])
    with pytest.raises(TextError, match="row 1 is not JSON"):
        list(Corpus(Text(files=(str(tmp_path / "large.json"),))).documents())


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_text(name: str) -> None:
    with pytest.raises(TextError, match="an empty name"):
        Corpus(Text(files=(name,)))


def test_a_text_that_is_removed_while_it_is_read_is_named(tmp_path: Path) -> None:
    corpus = Corpus(Text(files=(str(write_text(tmp_path / "text.txt")),)))
    (tmp_path / "text.txt").unlink()
    with pytest.raises(TextError, match="was removed while it was read"):
        list(corpus.documents())


def test_a_date_beyond_python_s_in_parquet_is_named(tmp_path: Path) -> None:
    said = pyarrow.array([[{"role": "user", "content": "hi", "at": 9 * 10**17}]])
    kind = pyarrow.list_(pyarrow.struct([("role", "string"), ("content", "string"), ("at", pyarrow.timestamp("us"))]))
    pyarrow.parquet.write_table(pyarrow.table({"messages": said.cast(kind)}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match=r"a\.parquet has no readable row after row 0"):
        read(tmp_path / "a.parquet")


@needs_wiki
@pytest.mark.parametrize("name", ["folder", "text.txt/wiki.txt", "pipe"])
def test_the_packaged_text_is_written_to_a_file_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    write_text(tmp_path / "text.txt")
    with pytest.raises(RecipeError, match=r"is a folder, a pipe or a device: name a file|is no folder"):
        write_wiki(tmp_path / name, "en-us", force=True)
