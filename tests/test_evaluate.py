"""What evaluate says is what the model says: alone and joined, in pairs, beside yardsticks, and in lm-eval's words."""

import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from llm.base.errors import TextError
from llm.inference.scoring import likelihoods, read_pairs
from llm.insight.baselines import ngram_bits, yardsticks
from llm.run_folder.loaded_run import open_run
from tests.forks import SENTENCES, Ended, run, script, train, write_recipe, write_text


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("evaluate")
    recipe = write_recipe(here, write_text(here / "text.txt"), **{"model.context": 32, "train.steps": 40})
    assert run(train(recipe), here).status == 0
    texts = [" ".join(SENTENCES[number:] + SENTENCES[: number % 4]) for number in range(6)]
    texts[0] = texts[0].replace(" ", "\u00a0") + "\n\n"
    (here / "task").mkdir()
    (here / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (here / "task" / "own.yaml").write_text(TASK.format(file=here / "own.jsonl"))
    return here


TASK = """task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def evaluate(here: Path, *arguments: object) -> Ended:
    return run(script("module:llm.evaluate", "tiny", *arguments), here)


def number(text: str, name: str) -> float:
    found = re.search(rf"{name} +([0-9.,e+-]+)", text)
    assert found, text
    return float(found[1].replace(",", ""))


def test_documents_alone_cost_what_each_costs_by_itself(here: Path) -> None:
    opened = open_run(str(here / "runs/tiny"), torch.device("cpu"))
    texts = [json.loads(line)["text"] for line in (here / "own.jsonl").read_text().splitlines()]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([opened.tokenizer.bos, *opened.tokenizer.encode(text)])
        for low in range(0, len(ids) - 1, 32):
            high = min(low + 32, len(ids) - 1)
            logits = opened.model.logits(ids[None, max(0, high - 32) : high])[0, low - high :].log_softmax(-1)
            nats -= logits.gather(1, ids[low + 1 : high + 1, None]).sum().item()
    ended = evaluate(here, "--text", "own.jsonl", "--alone")
    assert ended.status == 0 and "6 documents, each alone" in ended.out, ended.err
    assert number(ended.out, "bits per byte") == pytest.approx(
        nats / sum(len(text.encode()) for text in texts) / math.log(2), abs=1e-4
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b", 2),
        ("a\u00a0b", 2),
        ("a\u2003b\u3000c\x85d", 4),
        ("a b\n", 3),
        ("\na b\n\n", 4),
        ("a\x1cb", 2),
        ("word", 1),
    ],
)
def test_words_are_counted_as_lm_eval_counts_them(here: Path, text: str, words: int) -> None:
    (here / "words.jsonl").write_text(json.dumps({"text": text}))
    ended = evaluate(here, "--text", "words.jsonl")
    bits = number(ended.out, "bits per byte") * len(text.encode())
    assert number(ended.out, "perplexity a word") == pytest.approx(2 ** (bits / words), rel=0.01), ended.err


def test_of_pairs_the_likelier_one_is_counted(here: Path) -> None:
    opened = open_run(str(here / "runs/tiny"), torch.device("cpu"))
    sentences = ["The river rises.", "rises The.", "a", "b", "b", "a", "x", "x"]  # one of two turned, none of two equal
    alone = [likelihoods(opened, [sentence], 1)[0] for sentence in sentences]
    assert likelihoods(opened, sentences, 3) == pytest.approx(alone, rel=1e-5)
    pairs = list(zip(sentences[::2], sentences[1::2], strict=True))
    (here / "pairs.tsv").write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs))
    (here / "pairs.jsonl").write_text(
        "\ufeff"  # as some editors begin a file
        + "\n".join(json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": 1}) for good, bad in pairs)
    )
    assert read_pairs(here / "pairs.tsv") == read_pairs(here / "pairs.jsonl") == pairs
    right = sum(good > bad for good, bad in zip(alone[::2], alone[1::2], strict=True))
    ended = evaluate(here, "--pairs", "pairs.tsv", "--rows", 3)
    assert ended.status == 0 and f"likelier in {right} of 4, {right / 4:.2%}" in ended.out and 0 < right < 3, ended.err


@pytest.mark.parametrize(
    "content, said", [("a b\n", "line 1"), ("a\tb\nc\n", "line 2"), ("", "no pairs"), ("a\tb\tc", "line 1")]
)
def test_what_is_no_pair_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "pairs.tsv").write_text(content)
    with pytest.raises(TextError, match=said):
        read_pairs(tmp_path / "pairs.tsv")
    (tmp_path / "pairs.jsonl").write_text('{"good": "a", "bad": null}')  # which is no sentence "None"
    with pytest.raises(TextError, match="line 1"):
        read_pairs(tmp_path / "pairs.jsonl")
    for line in ('{"good": "a", "bad": ""}', '{"good": "\\ud800a", "bad": "b"}'):
        (tmp_path / "pairs.jsonl").write_text(line)
        with pytest.raises(TextError, match="line 1"):
            read_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"good": "a"}')
    with pytest.raises(TextError, match="line 1"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_options_of_texts_are_refused_beside_pairs_and_a_sentence_that_is_too_long_is_shown(here: Path) -> None:
    (here / "long.tsv").write_text("The river\t" + "word " * 300)
    for option in ("--alone", "--yardsticks"):
        ended = evaluate(here, "--pairs", "long.tsv", option)
        assert ended.status == 2 and "--alone and --yardsticks are for texts" in ended.err
    ended = evaluate(here, "--pairs", "long.tsv")
    assert ended.status == 2 and "shorten 'word word" in ended.err and ended.err.count("\n") == 1


def test_yardsticks_stand_beside_the_result(here: Path) -> None:
    ended = evaluate(here, "--yardsticks")
    assert ended.status == 0, ended.err
    found = {name: number(ended.out, name) for name in ("gzip", "xz", "byte 5-gram", "this run")}
    assert found["this run"] == number(ended.out, "bits per byte") and found["xz"] > 0 and found["gzip"] < 8


def test_the_5_gram_is_the_one_counted_by_hand() -> None:
    train, text = b"abracadabra abracadabra", b"abra cadabrx"
    bits = 0.0
    for at, byte in enumerate(text):
        share = 1 / 256
        for length in range(min(at, 4) + 1):
            context = text[at - length : at]
            after = Counter(train[i + length] for i in range(len(train) - length) if train[i : i + length] == context)
            if after:
                share = (after[byte] + len(after) * share) / (after.total() + len(after))
        bits -= math.log2(share)
    assert ngram_bits(train, text) == pytest.approx(bits, rel=1e-12)
    assert yardsticks(train, text)["gzip"] == 8 * len(zlib.compress(text, 9)) / len(text)
    assert ngram_bits(b"", text) == 8 * len(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_word_perplexity_that_we_find(here: Path) -> None:
    pytest.importorskip("lm_eval", reason="install the extra `eval`")
    ended = evaluate(here, "--tasks", "own_text", "--task-folder", "task")
    ours = evaluate(here, "--text", "own.jsonl", "--alone")
    assert ended.status == ours.status == 0, ended.err
    theirs = number(ended.out, "word_perplexity")
    assert theirs == pytest.approx(number(ours.out, "perplexity a word"), rel=1e-4)
    assert number(ended.out, "bits_per_byte") == pytest.approx(number(ours.out, "bits per byte"), abs=1e-4)


@pytest.mark.slow
def test_a_task_that_is_not_there_is_one_line(here: Path) -> None:
    pytest.importorskip("lm_eval", reason="install the extra `eval`")
    ended = evaluate(here, "--tasks", "no_such_task")
    assert ended.status == 2 and "lm-eval knows no no_such_task" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("words", [("--tasks", ""), ("--tasks", ", "), ("--task-folder", ".")])
def test_tasks_without_a_name_are_refused(here: Path, words: tuple[str, ...]) -> None:
    done = evaluate(here, *words)
    assert done.status == 2 and done.err.count("\n") == 1 and "--tasks" in done.err and not done.out, done


@pytest.mark.parametrize("words", [(), ("--alone",)])
def test_a_blank_text_is_refused(here: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "blank.txt").write_text("\n\n  \n")
    done = run(script("module:llm.evaluate", "tiny", "--text", tmp_path / "blank.txt", *words), here)
    assert done.status == 2 and done.err.count("\n") == 1 and "nothing to predict" in done.err, done.err
