"""Chat: trained to the bit, refused where it was not trained, and a conversation at a terminal."""

import json
from pathlib import Path

import pytest

from tests.data.test_conversations import said
from tests.forks import Ended, digest, run, run_group, script, train, write_recipe, write_text


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


@pytest.mark.parametrize(("world", "shard"), [(1, "none"), (2, "none"), (2, "full")])
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
