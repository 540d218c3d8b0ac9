"""Editors check a recipe by recipes/schema.json as `load` does: what one takes the other takes, as far as one key decides."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llm.base.errors import RecipeError
from llm.config.json_schema import json_schema
from llm.config.reading import load
from llm.config.schema import all_keys, sections

FOLDER = Path(__file__).parents[2] / "recipes"
SCHEMA = json.loads((FOLDER / "schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
SHIPPED = sorted(FOLDER.glob("*.yaml"))
SMALLEST = {"text": {"files": ["my.txt"]}, "train": {"steps": 100}}


def test_the_schema_is_that_of_the_recipe_s_keys() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert json_schema() == SCHEMA, "run: python -m llm.config.json_schema > recipes/schema.json"
    known = {name for name in SCHEMA["properties"] if name not in sections()} - {"format"}
    for section in sections():
        known |= {f"{section}.{name}" for name in SCHEMA["properties"][section]["properties"]}
    assert known == set(all_keys())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_the_schema_and_follows_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    VALIDATOR.validate(yaml.safe_load(text))


def both(folder: Path, text: str) -> list[bool]:
    """Whether the schema and `load` take a recipe."""
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load(path)
        loaded = True
    except RecipeError:
        loaded = False
    return [VALIDATOR.is_valid(yaml.safe_load(text)), loaded]


def with_key(key: str, written: str) -> str:
    section, _, leaf = key.rpartition(".")
    tree: dict[str, Any] = {name: dict(keys) for name, keys in SMALLEST.items()}
    if key in ("train.tokens", "train.epochs", "train.hours"):
        del tree["train"]["steps"]
    (tree.setdefault(section, {}) if section else tree)[leaf] = "VALUE"
    return yaml.safe_dump(tree).replace("VALUE", written)


@pytest.mark.parametrize(
    ("key", "written"),
    [
        *(("train.tokens", each) for each in ("10M", "1.5k", "1_000_000", "1e6", "'8192'", "7000 m")),
        *(("train.hours", each) for each in ("8h", "90min", "2", "0.5 h", "2D", "36s")),
        *(("train.epochs", each) for each in ("3", "0.72", "5%", ".5")),
        *(("train.weight_decay", each) for each in ("0.7 epochs", ".5Epochs", "1 epoch", "auto", "0.1", "0")),
        *(("train.learning_rate", each) for each in ("1e-3", "3E-4", ".5", "0.02", "+5%")),
        *(("train.skip", each) for each in ("[1200-1210]", "[3, 4-5]", "7", "[]")),
        *(("text.validation", each) for each in ("5%", "0.5 %", "0.05", "0")),
        *(("model.dropout", each) for each in ("auto", "0", "10%")),
        *(("model.tied", each) for each in ("yes", "no", "on", "'off'", "true")),
        *(("model.from", each) for each in ("~", "folder")),
        *(("tracking.wandb", each) for each in ("off", "'off'", "no", "online")),
        *(("machine.micro_batch", each) for each in ("auto", "4", "'4'")),
        *(("evaluate.prompts", each) for each in ("auto", "[no, 1_000, '']", "My self Har")),
        *(("tokenizer.vocabulary", each) for each in ("4096", "32k")),
        *(("run", each) for each in ("2024", "1e3", "no", "small")),
        *(("format", each) for each in ("1", "2", "3", "'2'")),
        *(("machine", each) for each in ("~", "{}")),
        ("text", "{sources: {a: {files: [a], weight: 90%}, b-1: {files: b, epochs: 2, documents: lines, field: t}}}"),
    ],
)
def test_a_value_that_load_takes_is_taken(tmp_path: Path, key: str, written: str) -> None:
    assert both(tmp_path, with_key(key, written)) == [True, True]


@pytest.mark.parametrize(
    ("key", "written"),
    [
        *((key, "many") for key in ("train.tokens", "train.hours", "train.epochs", "train.weight_decay", "seed")),
        *(("train.hours", each) for each in ("8h30m", "5%", "8w", "0")),
        *(("train.tokens", each) for each in ("5%", "1.5", "0", "-1", "8h", "[1]", "10 M b")),
        *(("train.learning_rate", each) for each in ("10", "-0.1", "fast", "true", "8h")),
        *(("train.weight_decay", each) for each in ("epochs", "100", "automatic")),
        *(("text.validation", each) for each in ("1", "auto", "5 percent")),
        *(("model.tied", each) for each in ("maybe", "1")),
        *(("model.context", each) for each in ("1", "1048576")),
        *(("model.dim", each) for each in ("{a: 1}", "[256]", "''")),
        *(("train.optimizer", each) for each in ("sgd", "no", "[muon]")),
        *(("machine.precision", each) for each in ("fp8", "16")),
        *(("evaluate.prompts", each) for each in ("[[a]]", "{a: 1}")),
        *(
            (key, "1")
            for key in ("dim", "sead", "model.dims", "model.vocabulary", "train.optimiser", "from_", "model.from_")
        ),
        *(("format", each) for each in ("4", "0")),
        *(("model", each) for each in ("4", "[dim]")),
        *(
            ("text", f"{{sources: {each}}}")
            for each in (
                "{}",
                "4",
                "{a: [a]}",
                "{a: {files: [a]}}",
                "{a: {weight: 1}}",
                "{a.b: {files: a, weight: 1}}",
                "{a: {files: a, weight: 0}}",
                "{a: {files: a, weight: 1, cache: b}}",
                "{a: {files: a, weight: 1, wait: 2}}",
            )
        ),
    ],
)
def test_a_value_that_load_refuses_is_refused(tmp_path: Path, key: str, written: str) -> None:
    assert both(tmp_path, with_key(key, written)) == [False, False]


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: 1}\n",
        "text: {files: [a]}\n",
        "text: {files: [a]}\ntrain: {steps: 1, epochs: 2}\n",
        "text:\ntrain: {steps: 1}\n",
        "text: {files: [a], sources: {b: {files: [b], weight: 1}}}\ntrain: {steps: 1}\n",
    ],
)
def test_a_recipe_without_a_text_or_with_another_count_of_lengths_than_one_is_refused(
    tmp_path: Path, text: str
) -> None:
    assert both(tmp_path, text) == [False, False]


def test_the_table_of_the_readme_says_of_each_key_what_its_schema_says() -> None:
    table = (FOLDER / "README.md").read_text("utf-8")
    for name in all_keys():
        section, _, leaf = name.rpartition(".")
        keys = SCHEMA["properties"][section]["properties"] if section else SCHEMA["properties"]
        assert f"| {keys[leaf]['description']} |\n" in table.partition(f"| `{name}` |")[2].partition("\n")[0] + "\n", (
            name
        )
