"""A text that grows is encoded where it is new and nowhere else; what is held out stays so, and no bit is another."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm.config.reading import load
from llm.data import growth, shard_writer, survey
from llm.data.pipeline import Prepared, prepare_text
from llm.data.shards import SIDES, Shards
from llm.data.tokenizer import Tokenizer
from llm.prepare import main
from tests.data.test_pipeline import digests, settings
from tests.data.test_shards import texts
from tests.data.test_tokenizer import DOCUMENTS
from tests.forks import run, train, write_recipe, write_text

MARKER = b"<|endoftext|>\n"
MANY = [f"{number} ".encode() + DOCUMENTS[number % 200] for number in range(1500)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "FILE", 60_000)
    monkeypatch.setattr(shard_writer, "BLOCK", 9_000)
    monkeypatch.setattr(survey, "SEGMENT", 50_000)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of text that are encoded, one number a block."""
    sizes: list[int] = []
    encode = shard_writer.LocalEncoder.encode

    def counted(self: shard_writer.LocalEncoder, text: bytes, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(text))
        return encode(self, text, lengths)

    monkeypatch.setattr(shard_writer.LocalEncoder, "encode", counted)
    return sizes


def ready(folder: Path, text: Path | str, anew: bool = False, **changes: object) -> tuple[Prepared, str]:
    lines: list[str] = []
    (folder / "recipe.yaml").write_text("text: {files: [text.txt]}\ntrain: {steps: 1}\n", encoding="utf-8")
    recipe = load(folder / "recipe.yaml", settings(folder, text, changes))
    return prepare_text(recipe, lines.append, anew=anew), "\n".join(lines)


def documents(prepared: Prepared) -> list[list[bytes]]:
    return [texts(side, prepared.tokenizer) for side in (prepared.shards.train, prepared.shards.validation)]


def is_as_from_scratch(folder: Path, grown: Prepared, text: Path | str) -> None:
    """The shards are those that the same tokenizer gives in an empty cache."""
    grown.tokenizer.save(folder / "kept")
    given = {"tokenizer__path": folder / "kept/tokenizer.model", "text__cache": folder / "scratch"}
    scratch, _ = ready(folder, text, **given)
    assert scratch.shards.fingerprint == grown.shards.fingerprint
    assert digests(scratch.shards.folder) == digests(grown.shards.folder)
    names = [file["name"] for side in SIDES for file in grown.shards.manifest["files"][side]]
    assert len(names) > 4


def stay(before: list[list[bytes]], after: list[list[bytes]]) -> None:
    """No document has changed sides."""
    assert not set(before[0]) & set(after[1]) and not set(before[1]) & set(after[0])


def test_a_document_that_stands_there_twice_is_not_gone(tmp_path: Path) -> None:
    whole, path = [*MANY, *MANY[-40:]], tmp_path / "text.txt"
    path.write_bytes(b"".join(each + MARKER for each in whole))
    ready(tmp_path, path)
    path.write_bytes(b"".join(each + MARKER for each in [*whole, b"a new document\n"]))
    _, said = ready(tmp_path, path)
    assert "1 documents (0.0 MB) are new since it was last prepared, 0 are gone" in said


@pytest.mark.parametrize("fate", ["appended", "edited", "removed", "begun anew"])
def test_of_one_file_only_what_is_new_is_encoded(tmp_path: Path, encoded: list[int], fate: str) -> None:
    whole, path = list(MANY), tmp_path / "text.txt"
    path.write_bytes(b"".join(each + MARKER for each in whole))
    first, _ = ready(tmp_path, path)
    assert len(first.shards.manifest["segments"]) > 5
    kept, before = digests(first.shards.folder), documents(first)
    added = [b"a new document of this day\n", b"and another one, number 2\n"]
    change = {
        "appended": whole + added, "edited": [*whole[:700], added[0], *whole[701:], added[1]],
        "removed": [*whole[:100], *whole[200:]], "begun anew": added + whole,
    }  # fmt: skip
    path.write_bytes(b"".join(each + MARKER for each in change[fate]))
    encoded.clear()
    grown, said = ready(tmp_path, path)
    new = set(change[fate]) - set(whole)
    assert sum(encoded) == sum(map(len, new)), "only what is new is encoded"
    gone = len(set(whole) - set(change[fate]))
    assert f"text: {len(new)} documents (0.0 MB) are new since it was last prepared, {gone} are gone" in said
    assert grown.tokenizer.fingerprint == first.tokenizer.fingerprint and "training a tokenizer" not in said
    after = documents(grown)
    stay(before, after)
    assert sorted(after[0] + after[1]) == sorted(change[fate])
    assert digests(first.shards.folder) == kept, "old shards stay valid"
    is_as_from_scratch(tmp_path, grown, path)
    assert "made before" in ready(tmp_path, path)[1]
    encoded.clear()
    back, said = ready(tmp_path, path, anew=True)
    assert "training a tokenizer" in said and sum(encoded)
    assert ready(tmp_path, path)[0].shards.fingerprint == back.shards.fingerprint


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_of_a_folder_only_new_and_edited_files_are_encoded(tmp_path: Path, encoded: list[int], kind: str) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()

    def write(name: str, some: list[bytes]) -> None:
        rows = b"".join(json.dumps({"text": each.decode()}).encode() + b"\n" for each in some)
        (notes / f"{name}.{kind}").write_bytes(rows if kind == "jsonl" else MARKER.join([*some, b""]))

    for number in range(30):
        write(f"{number:02}", MANY[number * 50 : number * 50 + 50])
    first, _ = ready(tmp_path, notes)
    before = documents(first)
    write("00a", [b"a new file in between\n"])
    write("07", [*MANY[350:399], b"an edited document\n"])
    write("99", [b"and one at the end\n"])
    (notes / f"20.{kind}").unlink()
    encoded.clear()
    grown, said = ready(tmp_path, notes)
    assert sum(encoded) == len(b"a new file in between\nan edited document\nand one at the end\n")
    assert "text: 3 documents (0.0 MB) are new" in said and "51 are gone" in said
    after = documents(grown)
    stay(before, after)
    assert len(after[0]) + len(after[1]) == 1500 - 51 + 3
    is_as_from_scratch(tmp_path, grown, notes)


def test_a_text_that_grew_and_shrank_again_is_the_one_of_before(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_bytes(MARKER.join(MANY[:300]))
    first, _ = ready(tmp_path, notes)
    (notes / "b.txt").write_bytes(MARKER.join(MANY[300:400]))
    ready(tmp_path, notes)
    (notes / "b.txt").unlink()
    again, _ = ready(tmp_path, notes)
    assert again.shards.fingerprint == first.shards.fingerprint


def test_documents_in_another_order_are_said_to_be_the_same(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(each + MARKER for each in MANY))
    ready(tmp_path, path)
    path.write_bytes(b"".join(each + MARKER for each in MANY[::-1]))
    assert (
        "text: its documents are unchanged, but their order or number differs from the last preparation"
        in ready(tmp_path, path)[1]
    )


def test_an_unchanged_beginning_is_not_cut_into_documents_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(each + MARKER for each in MANY))
    ready(tmp_path, path)
    with path.open("ab") as file:
        file.write(b"new\n" + MARKER)
    read: list[int] = []
    one = growth.key_of

    def counted(document: bytes) -> int:
        read.append(len(document))
        return one(document)

    monkeypatch.setattr(growth, "key_of", counted)
    monkeypatch.setattr(shard_writer, "key_of", counted)
    ready(tmp_path, path)
    assert sum(read) < 2 * (survey.SEGMENT + 3000)  # of more than a million bytes, by the survey and by the encoder


def test_what_is_held_out_stays_so_where_a_small_text_needed_a_larger_share(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MARKER.join(MANY[:60]))
    first, said = ready(tmp_path, path, text__validation=0.001, text__documents="marker <|endoftext|>")
    assert "would leave too little to measure by" in said
    path.write_bytes(MARKER.join(MANY[:119]))
    grown, _ = ready(tmp_path, path, text__validation=0.001, text__documents="marker <|endoftext|>")
    assert set(documents(first)[1]) <= set(documents(grown)[1])


def test_the_rule_of_a_text_stays_when_it_grows(tmp_path: Path, encoded: list[int]) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\n\n\n".join(MANY))
    first, _ = ready(tmp_path, path)
    with path.open("ab") as file:
        file.write(b"".join(b"\n<|endoftext|>\n%d" % number for number in range(9)))
    encoded.clear()
    grown, _ = ready(tmp_path, path)
    assert sum(encoded) < 1000 and grown.shards.manifest["rule"] == first.shards.manifest["rule"]


def test_another_text_under_the_same_name_is_prepared_anew(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MARKER.join(MANY))
    first, _ = ready(tmp_path, path)
    path.write_bytes(MARKER.join(each[::-1] for each in map(bytes.upper, MANY) if each.isascii()))
    other, said = ready(tmp_path, path)
    assert "training a tokenizer" in said and other.tokenizer.fingerprint != first.tokenizer.fingerprint


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 6])
def test_growing_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    path = tmp_path / "text.txt"
    draw = random.Random(1)
    path.write_bytes(MARKER.join(MANY[:800]))
    ready(tmp_path, path)
    path.write_bytes(MARKER.join(draw.sample(MANY, len(MANY))))
    write_file = shard_writer._write_file

    def stopped(*given: object) -> Iterator[None]:
        nonlocal after
        after -= 1
        if after == 0:
            raise Killed
        return write_file(*given)  # type: ignore[arg-type, return-value]

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_file", stopped)
        with pytest.raises(Killed):
            ready(tmp_path, path)
    grown, _ = ready(tmp_path, path)
    is_as_from_scratch(tmp_path, grown, path)


def test_shards_of_an_earlier_version_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MARKER.join(MANY))
    monkeypatch.setattr("llm.data.shards.Split.document_keys", lambda side: np.empty(0, np.uint64))
    monkeypatch.setattr("llm.data.shards.Split.document_sizes", lambda side: np.empty(0, np.int32))
    ready(tmp_path, path)
    path.write_bytes(MARKER.join([*MANY, b"new\n"]))
    grown, _ = ready(tmp_path, path)
    monkeypatch.undo()
    assert Shards.open(grown.shards.folder, verify=True).train.documents


def test_a_new_run_goes_on_from_one_of_before_and_says_what_is_new(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt", documents=60))
    assert run(train(recipe, stop_after=5), tmp_path).status == 75
    write_text(tmp_path / "text.txt", documents=75)
    main([str(recipe)])
    again = run(train(recipe), tmp_path)
    assert again.status == 0 and "text: changed since then" in again.out, again.err
    on = run(train(recipe, "run=on", "from=tiny/step-000012", "train.steps=15"), tmp_path)
    assert on.status == 0, on.err
    assert "text: 15 documents are new since tiny/step-000012, 0 are gone" in on.out


def test_the_tokenizer_is_a_function_of_the_text_that_it_was_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MARKER.join(MANY))
    first, _ = ready(tmp_path, path)
    train_texts = documents(first)[0]
    assert Tokenizer.train(train_texts, vocab_size=320).fingerprint == first.tokenizer.fingerprint
