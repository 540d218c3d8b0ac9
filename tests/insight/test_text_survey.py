"""A survey of a text finds what was planted in it, and nothing in a clean one."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from llm.config.schema import Text
from llm.data.documents import fraction
from llm.data.progress import Show
from llm.data.tokenizer import Tokenizer
from llm.insight import text_counts
from llm.insight.near_duplicates import Index
from llm.insight.text_survey import Survey, survey, tokens_by_size
from tests.forks import run, script

SILENT = Show(lambda line: None, False)


def words(rng: random.Random, count: int) -> list[str]:
    """Words of which few are frequent, as in a language."""
    return [spelt(int(3000 * rng.random() ** 2)) for _ in range(count)]


def spelt(number: int) -> str:
    return "".join("bdfgklmnprst"[int(digit)] + "aeiou"[int(digit) % 5] for digit in str(number))


def article(rng: random.Random) -> str:
    text = words(rng, rng.randrange(50, 250))
    return "\n".join(" ".join(text[at : at + 12]) + "." for at in range(0, len(text), 12))


def edited(rng: random.Random, text: str) -> str:
    """As copies differ in the wild: some words, a line more, case, punctuation, white space."""
    parts = text.split(" ")
    for _ in range(max(1, len(parts) // 50)):
        parts[rng.randrange(len(parts))] = f"x{rng.randrange(1000)}"
    changed = " ".join(parts)
    return rng.choice([changed, changed.upper(), changed.replace(" ", "  "), changed.replace(".", " !"), changed + "\nRead on"])  # fmt: skip


def shingles(text: str) -> set[tuple[str, ...]]:
    found = re.findall("[a-z0-9]+", text.lower())
    return {tuple(found[at : at + 3]) for at in range(max(1, len(found) - 2))}


def jaccard(left: str, right: str) -> float:
    ours, theirs = shingles(left), shingles(right)
    return len(ours & theirs) / len(ours | theirs)


def planted(seed: int) -> tuple[list[str], set[tuple[int, int]]]:
    """2,000 documents, 300 more that are near copies of one each, and 300 that share a third of one."""
    rng = random.Random(seed)
    documents = [article(rng) for _ in range(2000)]
    pairs = set()
    for _ in range(300):
        at = rng.randrange(2000)
        pairs.add((at, len(documents)))
        documents.append(edited(rng, documents[at]))
        lines = documents[rng.randrange(2000)].split("\n")
        documents.append("\n".join(lines[: len(lines) // 3]) + "\n" + article(rng))
    return documents, pairs


def written(path: Path, documents: list[str]) -> Text:
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return Text(files=(str(path),), validation=0.25)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_planted_near_duplicates_and_leaks_are_found(tmp_path: Path, seed: int) -> None:
    documents, pairs = planted(seed)
    found = survey(written(tmp_path / "text.jsonl", documents), SILENT)
    assert sum(found.documents) == len(documents)
    groups = [{number - 1 for number in group} for group in found.groups]
    group_of = {number: at for at, group in enumerate(groups) for number in group}
    together = {pair for pair in pairs if group_of.get(pair[0], -1) == group_of.get(pair[1], -2)}
    in_pairs = {number for pair in pairs for number in pair}
    assert len(together) >= 0.95 * len(pairs), len(together)
    assert sum(number in in_pairs for number in group_of) >= 0.95 * len(group_of)

    held_out = [fraction(each.encode()) < 0.25 for each in documents]
    assert sum(held_out) == found.documents[1]  # the very split of training
    copies = [pair for pair in pairs if held_out[pair[0]] != held_out[pair[1]]]
    leaks = {number for pair in copies for number in pair if held_out[number]}
    leaked = {number - 1 for number in found.leaked}
    hits = len(leaks & leaked)
    print(f"{len(pairs)} pairs: recall {len(together) / len(pairs):.3f}; {len(leaks)} leaks: recall {hits / len(leaks):.3f}, precision {hits / len(leaked):.3f}")  # fmt: skip
    assert hits >= 0.95 * len(leaks) and hits >= 0.95 * len(leaked)


def test_alike_is_a_share_of_runs_of_three_words() -> None:
    """Documents above 0.8 are found, those below 0.45 are not, whatever lies between."""
    rng = random.Random(4)
    documents = []
    for _ in range(400):
        text = words(rng, 120)
        other = [f"y{spelt(rng.randrange(10**6))}" if rng.random() < 0.08 * rng.random() else word for word in text]
        documents += [" ".join(text), " ".join(other)]
    index = Index()
    for at in range(0, len(documents), 70):
        index.add([each.encode() for each in documents[at : at + 70]])
    found = {tuple(pair) for pair in index.alike(np.ones(len(documents), bool)).pairs.tolist()}
    truth = {(at, at + 1): jaccard(*documents[at : at + 2]) for at in range(0, len(documents), 2)}
    surely = {pair for pair, share in truth.items() if share > 0.8}
    assert len(surely) > 50 and len(found & surely) >= 0.99 * len(surely)
    assert all(truth.get((left, right), 0) > 0.45 for left, right in found)


def test_scripts_without_spaces_have_words_too() -> None:
    rng = random.Random(5)
    text = "".join(chr(0x4E00 + int(2000 * rng.random())) for _ in range(200))
    other = "".join(chr(0x4E00 + int(2000 * rng.random())) for _ in range(200))
    index = Index()
    index.add([each.encode() for each in (text, other, text[:100] + "的" + text[101:])])
    assert index.alike(np.ones(3, bool)).pairs.tolist() == [[0, 2]]


def test_memory_is_bounded_and_copies_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `most` documents a part is kept, by content: most pairs are in it as pairs."""
    documents, pairs = planted(6)
    index = Index(most=800)
    for at in range(0, len(documents), 100):
        index.add([each.encode() for each in documents[at : at + 100]])
        assert index._held <= 800
    alike = index.alike(np.ones(len(documents), bool))
    sampled = set(alike.numbers.tolist())
    both = {pair for pair in pairs if set(pair) <= sampled}
    half = [pair for pair in pairs if len(set(pair) & sampled) == 1]
    assert alike.one_in == 4 and len(both) > 2 * len(half)
    assert {tuple(pair) for pair in alike.pairs.tolist()} >= {pair for pair in both if jaccard(*(documents[at] for at in pair)) > 0.85}  # fmt: skip

    monkeypatch.setattr(text_counts, "LINES", 100)
    lines, rng = text_counts.Lines(), random.Random(7)
    for _ in range(50):
        data = "\n".join(
            ["", *(" ".join(words(rng, 12)) for _ in range(60)), *["Home | About | Contact | Terms"] * 5, ""]
        ).encode()
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
        lines.add(data, ends[:-1] + 1, ends[1:])
        assert len(lines.keys) <= 200
    tied = text_counts.Lines()
    data = "\n".join(
        ["", *(f"a line that comes often, number {n:03}" for n in range(40) for _ in range(200)), ""]
    ).encode()
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    tied.add(data, ends[:-1] + 1, ends[1:])
    assert tied.found()[2] == [
        f"200 times: a line that comes often, number {n:03}" for n in range(3)
    ]  # Python's hash differs from process to process
    assert lines.found()[0] == [250] and "250 times: Home | About" in lines.found()[2][0]


def findings(found: Survey) -> dict[str, int]:
    return {each.name: each.count for each in found.findings}


def test_a_clean_text_has_no_findings_and_each_fault_is_counted(tmp_path: Path) -> None:
    rng = random.Random(8)
    documents = [article(rng) for _ in range(300)]
    found = survey(written(tmp_path / "clean.jsonl", documents), SILENT)
    assert not found.findings and found.scripts == {"Latin": 1.0}
    assert sum(found.lengths) == 300 and found.longest == max(map(len, documents))
    faults = [
        documents[3], documents[3], documents[5],
        article(rng) + "\n<p class='a'>AT&amp;T <br/></p> vector<int> a < b",
        article(rng) + "\nsee [[Rome|the city]] {{cite web}} '''bold'''\n== History ==\nhttps://example.org/a?b",
        article(rng) + " a\u200bb \x07 \ufffd \ufeff",
        article(rng) + "\n" + " ".join(words(rng, 3000)),
        *(article(rng) + "\nAll rights reserved. Contact us." for _ in range(12)),
        "Книга лежит на столе у окна", "本が机の上にあります",
    ]  # fmt: skip
    found = survey(written(tmp_path / "faults.jsonl", documents + faults), SILENT)
    assert findings(found) == {
        "exact duplicates": 3, "control and invisible characters": 4, "HTML tags": 3, "HTML entities": 1, "wiki links": 1,
        "wiki templates": 1, "wiki quotes": 1, "wiki headings": 1, "URLs": 1, "lines of more than 10,000 bytes": 1, "repeated lines": 12,
    }  # fmt: skip
    assert {"Latin", "Cyrillic", "Han", "Hiragana"} <= set(found.scripts)
    assert all(each.mend and each.samples for each in found.findings)


def test_small_vocabularies_are_counted_from_a_large_one() -> None:
    """Exactly, also for text and letters that were not there when it was trained."""
    rng = random.Random(9)
    documents = [article(rng) for _ in range(400)]
    data = [each.encode() for each in documents]
    other = [article(rng) + " Zażółć gęślą jaźń 漢字 \t x1y2 wwwww" for _ in range(20)]
    found = tokens_by_size(Tokenizer.train(data, vocab_size=1200), other, [260, 400, 1000, 1200])
    trained = {size: Tokenizer.train(data, vocab_size=size).encode_batch(other, 1) for size in (400, 1000, 1200)}
    assert found == {size: sum(map(len, ids)) for size, ids in trained.items()}


def test_of_conversations_the_messages_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Déjà?"}, {"role": "assistant", "content": "Yes, " * 40}]
    rows = [json.dumps({"messages": [*turns, {"role": "user", "content": f"{number:04}"}]}) for number in range(50)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    found = survey(Text(files=(str(tmp_path / "chat.jsonl"),), validation=0.3), Show(print, False))
    each = len("Déjà?".encode()) + 200 + 4 + 2
    assert found.text_bytes == [each * documents for documents in found.documents] and all(found.documents)
    assert found.characters == 50 * (each - 2)


def test_the_command_prints_for_people_and_machines_and_writes_nothing(tmp_path: Path) -> None:
    documents, _ = planted(10)
    written(tmp_path / "text.jsonl", [*documents[:200], "\x1b[31mred\x1b[0m " + documents[0]])
    people = run(script("module:llm.inspect", "text.jsonl"), tmp_path)
    assert people.status == 0, people.err
    assert (
        "documents: 201 (one document a row" in people.out
        and "near duplicates: 1, " in people.out
        and "\x1b" not in people.out
    )
    assert "begin with tokenizer.vocabulary=" in people.out and "5-gram" in people.out
    machine = run(script("module:llm.inspect", "text.jsonl", "--json", "--validation", "0.3"), tmp_path)
    assert json.loads(machine.out)["groups"] == [[1, 201]]
    assert {path.name for path in tmp_path.iterdir()} <= {"text.jsonl", "out.txt", "err.txt"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], "missing.txt is not there"),
        (["blank.txt"], "nothing but whitespace"),
        (["text.txt", "--documents", "odd"], "text.documents = 'odd'"),
        (["text.txt", "--validation", "2"], "--validation"),
        (["--", "-none.txt"], "./-none.txt is not there"),
        (["latin.txt"], "iconv -f cp1252"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "text.txt").write_text("A river rises in the north.\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("déjà vu, voilà le café à côté".encode("cp1252"))
    ended = run(script("module:llm.inspect", *arguments), tmp_path)
    assert ended.status == 2 and words in ended.err and ended.err.count("\n") == 1, ended.err


def test_the_smallest_texts_are_surveyed(tmp_path: Path) -> None:
    for name, text in {"one.txt": "Only one short line.\n", "dots.txt": "...\n!!!\n???\n", "chat.jsonl": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <b>you</b>"}]}\n'}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        found = survey(Text(files=(str(tmp_path / name),)), SILENT)
        assert sum(found.documents) == 1, name
    assert findings(found) == {"HTML tags": 2}
