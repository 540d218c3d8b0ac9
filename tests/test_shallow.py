"""train.shallow: the first steps train the first half of the blocks; the others stay the identity meanwhile."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import llm
from llm.base.errors import RecipeError
from llm.config.reading import load
from llm.model import cost
from llm.training.length import Length
from tests import tiny
from tests.examples.relu_squared import relu_squared
from tests.forks import digest, run, run_group, train, write_recipe, write_text

QUICKSTART = llm.recipes("quickstart")
SHALLOW = {
    "train.shallow": 5,
    "train.steps": 10,
    "model.layers": 3,
    "model.dropout": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_blocks_that_wait_are_the_identity_with_gradients_of_zero() -> None:
    model = tiny.transformer(layers=3)
    for block in model.blocks[2:]:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)  # type: ignore[union-attr, arg-type]
        torch.nn.init.zeros_(block.mlp.down_proj.weight)  # type: ignore[union-attr, arg-type]
    ids = tiny.ids(4, 17)
    whole = model(ids[:, :-1], ids[:, 1:])
    model.model.depth = 2
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert torch.equal(loss, whole)
    for index, block in enumerate(model.blocks):
        assert all((p.grad == 0).all() if index == 2 else p.grad.abs().sum() > 0 for p in block.parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.mlp.down_proj.weight.fill_(1.0)  # type: ignore[union-attr, operator]
        assert not torch.equal(model(ids[:, :-1], ids[:, 1:]), whole)  # what is measured is the whole model


@pytest.mark.parametrize(
    ("optimizer", "world", "shard"),
    [(optimizer, 1, "none") for optimizer in ("muon", "adamw")]
    + [
        pytest.param(optimizer, 2, shard, marks=pytest.mark.slow)
        for optimizer in ("muon", "adamw")
        for shard in ("none", "full")
    ],
)
def test_stopped_before_and_after_they_join_it_ends_in_the_same_bits(
    tmp_path: Path, text: Path, optimizer: str, world: int, shard: str
) -> None:
    recipe = write_recipe(tmp_path, text, **SHALLOW, **{"train.optimizer": optimizer, "machine.shard": shard})
    for name, stops in {"whole": (None,), "parts": (3, 5, 6, None)}.items():
        (tmp_path / name).mkdir()
        for stop in stops:
            for each in run_group(train(recipe, stop_after=stop), tmp_path / name, world):
                assert each.status == (75 if stop else 0), each.err
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    written = "model.layers.{}.self_attn.o_proj.weight"
    weights = {
        step: load_file(tmp_path / f"whole/runs/tiny/checkpoints/step-{step:06d}/model.safetensors") for step in (5, 10)
    }
    assert [bool(weights[5][written.format(layer)].any()) for layer in range(3)] == [True, True, False]
    assert weights[10][written.format(2)].any()


def test_of_a_run_for_a_time_at_most_half_is_shallow(tmp_path: Path, text: Path) -> None:
    keys = {"train.steps": None, "train.hours": "2s", "train.shallow": 10**6}
    ended = run(train(write_recipe(tmp_path, text, **SHALLOW | keys)), tmp_path)
    assert ended.status == 0, ended.err
    weights = load_file(max((tmp_path / "runs/tiny/checkpoints").iterdir()) / "model.safetensors")
    assert weights["model.layers.2.self_attn.o_proj.weight"].any()


@pytest.mark.parametrize(
    ("plan", "shallow"),
    [([], 100), ([(0, 40)], 20), ([(0, 400)], 100), ([(0, 100), (10, 60)], 30), ([(0, 100), (45, 60)], 45), ([(0, 40), (25, 90)], 20)],
)  # fmt: skip
def test_blocks_join_at_half_of_the_run_as_it_is_planned_then_and_stay(
    plan: list[tuple[int, int]], shallow: int
) -> None:
    length = Length(SimpleNamespace(recipe=load(QUICKSTART, ["train.hours=1", "train.shallow=100"])))  # type: ignore[arg-type]
    assert length.budget is not None
    length.budget.plan = plan
    assert length.shallow_steps() == shallow


def test_it_is_for_models_that_begin_at_random(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **SHALLOW)
    with pytest.raises(RecipeError, match=r"train\.shallow .* model\.from"):
        load(recipe, [f"model.from={tmp_path}", "tokenizer.path=null"])


def test_the_cost_of_a_run_counts_what_is_trained(tmp_path: Path, text: Path) -> None:
    whole = load(write_recipe(tmp_path, text, **SHALLOW | {"train.shallow": 0}))
    flops = cost.run_flops(whole.model, whole.train, 512)
    assert flops == 10 * whole.train.tokens_per_step * cost.flops_per_token(whole.model, 512)
    recipe = load(write_recipe(tmp_path, text, **SHALLOW))
    shallow = cost.run_flops(recipe.model, recipe.train, 512)
    assert 1 / 2 * 2 / 3 + 1 / 2 < shallow / flops < 1
    assert run(train(write_recipe(tmp_path, text, **SHALLOW)), tmp_path).status == 0
    assert cost.shallow_steps(load(tmp_path / "recipe.yaml", ["train.steps=6"]).train) == 3
    lines = map(json.loads, (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines())
    assert len([line for line in lines if "utilisation" in line]) > 0


def test_blocks_of_a_callers_own_model_do_not_wait(tmp_path: Path, text: Path) -> None:
    recipe = load(write_recipe(tmp_path, text, **SHALLOW | {"train.steps": 4}))
    llm.train(recipe, runs=tmp_path / "runs", model=relu_squared)
    weights = load_file(tmp_path / "runs/tiny/checkpoints/step-000001/model.safetensors")
    assert weights["model.layers.2.mlp.down_proj.weight"].any()


def test_a_run_that_goes_on_from_another_leaves_no_trained_block_out(tmp_path: Path, text: Path) -> None:
    """A run of 4 steps is shallow for 2; the one that goes on from it would be for 5."""
    assert run(train(write_recipe(tmp_path, text, **SHALLOW | {"train.steps": 4})), tmp_path).status == 0
    for name, shallow in (("longer", 5), ("deep", 0)):
        changes = {"run": name, "from": "tiny/step-4", "train.shallow": shallow}
        assert run(train(write_recipe(tmp_path, text, **SHALLOW | changes)), tmp_path).status == 0
    assert digest(tmp_path, "longer") == digest(tmp_path, "deep")
