"""The formulas of llm/cost.py against what a model and its optimizer hold, and against what an interface counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm import cost
from llm.model import Transformer
from llm.optimizer import Optimizer
from llm.recipe import Recipe, load
from llm.sharding import Rows, bounds, held
from tests.forks import ROOT, write_recipe

RECIPES = ["quickstart", "classic", "small", "medium", "large", "tiny"]
WORLDS = [1, 2, 4, 7]  # 7: rows that do not come out even, and processes that hold none


def recipe(folder: Path, name: str) -> Recipe:
    return load(write_recipe(folder, folder / "none.txt") if name == "tiny" else ROOT / "recipes" / f"{name}.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_bytes_are_those_that_model_and_optimizer_hold(tmp_path: Path, name: str) -> None:
    """On the meta device, where a 344 M model takes no room; each process's rows by the rule by which they are dealt."""
    read = recipe(tmp_path, name)
    muon, vocabulary = read.train.optimizer == "muon", read.tokenizer.vocabulary
    for tied in (True, False):
        shape = replace(read.model, tied=tied)
        with torch.device("meta"):
            model = Transformer.__new__(Transformer)
            model.initialise = lambda seed: None  # type: ignore[method-assign]  # no generator on this device
            model.__init__(shape, vocabulary)  # type: ignore[misc]
            moments = Optimizer(model, read.train).moments
        weights = [held(p) for p in model.parameters()]
        assert cost.parameters(shape, vocabulary) == sum(rows.local.numel() for rows in weights)
        for world in WORLDS:
            for index in range(world):
                found = cost.memory(shape, vocabulary, muon=muon, parts=world, index=index)
                assert found.weights == found.gradients == sum(part(rows, world, index) for rows in weights)
                assert found.moments == sum(part(rows, world, index) for rows in moments.values())


def part(rows: Rows, world: int, index: int) -> int:
    """Bytes of the rows that process `index` holds."""
    low, high = bounds(rows.shape[0], world, index)
    return rows.local[low:high].numel() * rows.local.element_size()


def test_bytes_for_people() -> None:
    assert [cost.size(n) for n in (0, 999, 999.7, 4.591e9, 2.5e13)] == ["0 bytes", "999 bytes", "1 kB", "4.59 GB", "25 TB"]
