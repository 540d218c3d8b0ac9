"""Chat: trained to the bit, refused where it was not trained, and a conversation at a terminal."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import llm.chat
import llm.inference.chat
from llm.base.errors import RecipeError, TextError
from llm.config.reading import load
from llm.data.chat_template import OwnTemplate
from llm.data.conversations import checked, messages_of
from llm.data.documents import Corpus, key_of
from llm.inference.chat import Conversation
from llm.inference.sampling import Sampling
from llm.run_folder.loaded_run import open_run
from tests.data.test_conversations import said
from tests.forks import Ended, digest, run, run_group, script, train, write_recipe, write_text
from tests.test_sample import Terminal


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base run, `tiny`, and conversations."""
    here = tmp_path_factory.mktemp("chat")
    said(here)
    recipe = write_recipe(here, write_text(here / "text.txt"), **{"train.steps": 3, "train.warmup": 0})
    assert run(train(recipe), here).status == 0
    return here


def chat_recipe(here: Path, folder: Path, **changes: object) -> Path:
    keys: dict[str, object] = {
        "run": "talk", "model.from": here / "runs/tiny/best", "model.context": 64, "train.tokens_per_step": 256,
        "evaluate.also": f"[{here / 'text.txt'}]", "evaluate.prompts": "auto", "train.steps": 8, "train.warmup": 0,
        "tokenizer.vocabulary": None, "model.dim": None, "model.layers": None, "model.heads": None}  # fmt: skip
    return write_recipe(folder, here / "chat.jsonl", **{**keys, "text.cache": here / "cache", **changes})


def done(each: Ended) -> None:
    assert each.status == 0, each.err


@pytest.mark.parametrize(
    ("world", "shard"), [(1, "none"), *(pytest.param(2, shard, marks=pytest.mark.slow) for shard in ("none", "full"))]
)
def test_stopped_in_the_middle_it_ends_in_the_same_bits(here: Path, tmp_path: Path, world: int, shard: str) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    recipe = chat_recipe(here, tmp_path, **{"machine.shard": shard, "machine.micro_batch": 1})
    for each in run_group(train(recipe), tmp_path / "whole", world):
        done(each)
    for stop in (3, 6):
        assert {each.status for each in run_group(train(recipe, stop_after=stop), tmp_path / "parts", world)} == {75}
    for each in run_group(train(recipe), tmp_path / "parts", world):
        done(each)
    assert digest(tmp_path / "parts", "talk") == digest(tmp_path / "whole", "talk")
    records = [
        [json.loads(line) for line in (tmp_path / name / "runs/talk/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    measured = [[line for line in lines if "also_bits_per_byte" in line] for lines in records]
    assert [line["step"] for line in measured[0]] == [0, 5, 8]
    assert measured[0] == measured[1]


def test_one_curve_on_one_process_and_two(here: Path, tmp_path: Path) -> None:
    losses = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        recipe = chat_recipe(here, folder, **{"train.optimizer": "adamw", "train.learning_rate": 0.003})
        for each in run_group(train(recipe), folder, world):
            done(each)
        lines = map(json.loads, (folder / "runs/talk/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_a_step_read_is_shown_as_conversations(here: Path, tmp_path: Path) -> None:
    done(run(train(chat_recipe(here, tmp_path, **{"train.steps": 2})), tmp_path))
    shown = run(script("module:llm.show", "talk", "--step", 2), tmp_path)
    assert shown.status == 0 and "<|assistant|>" in shown.out and "<|end|>" in shown.out


@pytest.fixture(scope="module")
def talk(here: Path) -> Path:
    """A folder with a run, `talk`, that was trained on conversations."""
    done(run(train(chat_recipe(here, here, **{"train.steps": 4})), here))
    return here


@contextmanager
def at_terminal(here: Path, *arguments: str, act: Callable[[], None] | None = None) -> Iterator[Terminal]:
    terminal = Terminal(act or script("module:llm.chat", "talk", "--seed", "3", *arguments), here)
    try:
        terminal.until("> ")
        yield terminal
    finally:
        with suppress(ProcessLookupError):
            os.kill(terminal.child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(terminal.child, 0)
        os.close(terminal.end)


def test_a_conversation_at_a_terminal(talk: Path) -> None:
    """Typed, pasted, taken back, instructed, saved, begun anew; each message sees those before it."""
    (talk / "said.jsonl").write_text('{"messages": []}')  # without a line end
    with at_terminal(talk, "--tokens", "8") as terminal:
        terminal.type("The river\n")
        terminal.until("> $")
        terminal.type("\x1b[200~It rises.\n\nIt flows.\x1b[201~\n")
        terminal.until("> $")
        for typed, answer in (
            ("/undo\n", "taken back"), ("/nothing\n", "/nothing is no command"), ("/help\n", "/save FILE"),
            ("/system Be kind.\n", "system message is set"), ("/save said.jsonl\n", "added to said.jsonl"),
            ("/save /no/where\n", "cannot be written"), ("x " * 60 + "\n", "longer than the"),
            ("/reset\n", "a new conversation"), ("/undo\n", "nothing to take back"), ("/save a\n", "after a first"),
        ):  # fmt: skip
            terminal.type(typed)
            terminal.until(answer)
            terminal.until("> $")
        terminal.type("\x04")
        assert terminal.status() == 0
    (_, row) = [json.loads(line)["messages"] for line in (talk / "said.jsonl").read_text().splitlines()]
    assert [each["role"] for each in row] == ["system", "user", "assistant"]
    assert row[0]["content"] == "Be kind." and row[1]["content"] == "The river" and row[2]["content"]


def test_ctrl_c_ends_an_answer_and_not_the_program(talk: Path) -> None:

    def act() -> None:
        def endless(model: object, prompts: list[list[int]], *given: object) -> Iterator[list[int]]:
            while True:
                yield [said[len(prompts[0]) % 2]]
                time.sleep(0.05)

        said = open_run("talk").tokenizer.encode("ab")
        llm.inference.chat.generate = endless  # type: ignore[assignment]
        script("module:llm.chat", "talk", "--seed", "3")()

    with at_terminal(talk, act=act) as terminal:
        terminal.type("The\n")
        terminal.until("a{5}|b{5}")
        terminal.type("\x03")
        terminal.until("> $")
        time.sleep(0.2)  # readline overlooks a signal that arrives while it handles a key
        terminal.type("\x03")  # nothing was typed
        terminal.until("> $")
        terminal.type("and\n")  # the conversation goes on
        terminal.until("a{5}|b{5}")
        terminal.type("\x03")
        terminal.until("> $")
        terminal.type("/save cut.jsonl\n")
        terminal.until("added to")
        terminal.until("> $")  # readline overlooks a Ctrl-D from before it waits
        terminal.type("\x04")
        assert terminal.status() == 0
        assert "Traceback" not in terminal.said and "interrupted" not in terminal.said
    (row,) = [json.loads(line)["messages"] for line in (talk / "cut.jsonl").read_text().splitlines()]
    assert [each["content"] for each in row[::2]] == ["The", "and"] and all(row[n]["content"][:5] for n in (1, 3))


def test_without_a_terminal_each_line_is_a_message(talk: Path) -> None:
    def act() -> None:
        (talk / "lines.txt").write_text(
            "\ufeffThe river\n\nIts \0capital\nIts capital\r\n/system a\0b\n/undo \r\n/redo\n/save\tkept.jsonl\r\n",
            newline="",
        )
        os.dup2(os.open("lines.txt", os.O_RDONLY), 0)
        import sys

        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        script("module:llm.chat", "talk", "--seed=3", "--tokens=8", "--temperature=0")()

    ended = run(act, talk)
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") >= 2 and "<|" not in ended.out
    assert ended.err.count("a NUL is no plain text") == 2 and ended.err.count("is no command") == 1, ended.err
    kept = (talk / "kept.jsonl").read_text()
    assert kept.count('"The river"') == 1 and "capital" not in kept and "system" not in kept


def test_a_run_without_chat_training_is_refused_in_one_line(talk: Path) -> None:
    ended = run(script("module:llm.chat", "tiny"), talk)
    assert ended.status == 2 and len(ended.err.splitlines()) == 1, ended.err
    assert "was not trained on conversations" in ended.err and "python -m llm.sample tiny" in ended.err


def test_the_oldest_exchanges_are_dropped_whole(talk: Path) -> None:
    conversation = Conversation(open_run("talk", runs=talk / "runs"))
    conversation.instruct("Be kind.")
    template, context = OwnTemplate(conversation.run.tokenizer), conversation.run.model.shape.context
    dropped = []
    for number in range(8):
        said = list(conversation.messages)
        prompt = conversation.prompt(f"The {number}", 8)
        assert len(prompt) <= context - 8
        kept = [said[0], *said[1 + conversation.dropped :], {"role": "user", "content": f"The {number}"}]
        assert prompt == template.prompt(kept) and conversation.dropped % 2 == 0
        dropped.append(conversation.dropped)
        "".join(conversation.answer(f"The {number}", 8, Sampling(), number))
        assert len(conversation.messages) == len(said) + 2  # the conversation itself is whole
    assert dropped == sorted(dropped) and dropped[-1] > 0
    with pytest.raises(RecipeError, match="shorten it"):
        conversation.prompt("The river " * 60, 8)


def test_an_exchange_without_an_answer_is_neither_read_again_nor_saved(
    talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its first word, or ended at once: it can be taken back, and the rest is a conversation."""
    conversation, ends = Conversation(open_run("talk", runs=talk / "runs")), iter([False, True, True, False])
    spoken = conversation.run.tokenizer.encode("ab")

    def answered(*given: object) -> Iterator[list[int]]:
        if next(ends):
            raise KeyboardInterrupt
        yield from ([id] for id in spoken)

    monkeypatch.setattr(llm.inference.chat, "generate", answered)
    conversation.instruct(" \n")  # as good as none
    for text in ("a", "b", "c", "d"):
        with suppress(KeyboardInterrupt):
            "".join(conversation.answer(text, 8, Sampling(), 1))
    kept = [{"role": role, "content": text} for text in "ad" for role, text in (("user", text), ("assistant", "ab"))]
    asked = {"role": "user", "content": "e"}
    assert conversation.prompt("e", 8) == conversation.template.prompt([*kept, asked])
    file = tmp_path / "said.jsonl"
    llm.chat.save(conversation, str(file))
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["messages"] == kept == checked("it", row)
    assert conversation.undo() and conversation.undo()  # d, then c, which was not answered
    assert [each["content"] for each in conversation.messages] == ["a", "ab", "b", ""]
    for name in ("a\0b", str(tmp_path), "/no/where/x", ""):
        with pytest.raises(RecipeError):
            llm.chat.save(conversation, name)
    conversation.messages[0]["content"] = "a\0"
    with pytest.raises(TextError, match="NUL"):
        llm.chat.save(conversation, str(file))
    assert len(file.read_text().splitlines()) == 1


def test_an_answer_may_end_its_turn_and_a_text_may_not(talk: Path) -> None:
    opened = open_run("talk", runs=talk / "runs")
    template = OwnTemplate(opened.tokenizer)
    assert template.end in opened.tokenizer.banned and template.end not in template.banned
    assert template.end in template.ends and template.end not in opened.tokenizer.ends
    assert set(opened.tokenizer.banned) - {template.end} == set(template.banned)


def test_evaluate_scores_the_answers_as_training_did(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run(script("module:llm.evaluate", "talk/newest"), talk)
    assert ended.status == 0, ended.err
    lines = map(json.loads, (talk / "runs/talk/metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "val_loss" in line][-1]
    assert (
        f"loss                  {last['val_loss']:.4f} nats a token\nbits per byte         {last['bits_per_byte']:.4f}"
        in ended.out
    )
    # Conversations in a file are scored as those that the run holds out.
    monkeypatch.chdir(talk)
    text = load(Path("runs/talk/recipe.yaml")).text
    held = [messages_of(each) for each in Corpus(text).documents() if key_of(each) / 2**64 < text.validation]
    (talk / "held.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in held))
    again = run(script("module:llm.evaluate", "talk/newest", "--text", "held.jsonl"), talk)
    assert again.out.splitlines()[2:] == ended.out.splitlines()[2:], again.err
    assert f"held.jsonl: {len(held)} conversations, their answers" in again.out
    refused = run(script("module:llm.evaluate", "talk", "--text", "held.jsonl", "--alone"), talk)
    assert refused.status == 2 and "holds conversations" in refused.err
    (talk / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    unanswered = run(script("module:llm.evaluate", "talk", "--text", "asked.jsonl"), talk)
    assert unanswered.status == 2 and len(unanswered.err.splitlines()) == 1, unanswered.err
