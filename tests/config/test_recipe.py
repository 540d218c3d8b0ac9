"""A recipe is read as a person means it, or refused in one line: who, value, rule and mend. Never a traceback."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llm.base.errors import LLMError, RecipeError, RefusedError
from llm.config.packaged import load_recipe
from llm.config.reading import dump, load, with_checksum
from llm.config.resolving import MANY_EPOCHS_DROPOUT, MAX_DECAY, with_steps
from llm.config.schema import Evaluate, Recipe, Text, Train, flat, science

MUTATED = 300  # recipes in the fast suite
MUTATED_SLOWLY = 1_000
SECONDS = (
    10.0  # of CPU time, the most that any reading may take: one that grows with the square of its text takes minutes
)
SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXT = "text: {files: [my.txt]}\n"
SMALLEST = TEXT + "train: {steps: 100}\n"


def read(folder: Path, text: str | bytes = SMALLEST, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path, overrides)


def one(folder: Path, key: str, text: str | bytes, *overrides: str) -> Any:
    """The value of one key."""
    return flat(read(folder, text, *overrides))[key]


def line_of(error: RecipeError) -> str:
    """The error's message, which is one short line that a terminal can show."""
    line = str(error)
    assert line.isprintable() and len(line) < 500
    return line


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    assert time.process_time() - began < SECONDS
    return line_of(caught.value)


# ---------------------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_written_out_and_read_again_as_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    assert recipe.run == path.stem
    assert read(tmp_path, dump(recipe)) == recipe
    known = with_steps(recipe, tokens_per_epoch=100_000_000)
    assert known.train.steps and not known.train.epochs
    assert read(tmp_path, dump(known)) == known


def test_a_recipe_has_at_most_70_keys(tmp_path: Path) -> None:
    assert len(flat(read(tmp_path))) <= 70


def test_what_follows_from_other_keys_is_filled_in(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, SMALLEST + "model: {dim: 96, heads: 3}\n", "train.tokens=100k", "train.tokens_per_step=8192"
    )
    assert recipe.run == "small", "a recipe without a name has that of its file"
    assert (recipe.model.head_dim, recipe.model.kv_heads, recipe.model.ffn_dim) == (32, 3, 256)
    assert recipe.train.steps == 13, "100,000 tokens begin a thirteenth step"


SCIENCE = {
    "seed": "2",
    "from": "other/step-10",
    "text.documents": "lines",
    "text.validation": "6%",
    "text.field": "body",
    "tokenizer.vocabulary": "5000",
    "tokenizer.terms": "[Har]",
    "model.dim": "512",
    "model.layers": "5",
    "model.heads": "8",
    "model.kv_heads": "2",
    "model.head_dim": "32",
    "model.ffn_dim": "512",
    "model.context": "1024",
    "model.dropout": "10%",
    "model.tied": "no",
    "model.from": "folder",
    "train.steps": "200",
    "train.tokens": "10M",
    "train.epochs": "3",
    "train.hours": "8h",
    "train.on": "all",
    "train.document_mask": "no",
    "train.tokens_per_step": "16384",
    "train.sampled_softmax": "2048",
    "train.shallow": "50",
    "train.teachers": "[runs/other/best]",
    "train.teachers_share": "90%",
    "train.teachers_last": "0.5",
    "train.optimizer": "adamw",
    "train.learning_rate": "1e-3",
    "train.warmup": "5",
    "train.decay": "10%",
    "train.weight_decay": "0",
    "train.clip": "0",
    "train.on_nonfinite": "skip",
    "train.skip": "[3-4]",
}
MACHINE = {
    "run": "other",
    "text.files": "[other.txt]",
    "text.cache": "elsewhere",
    "tokenizer.path": "other.model",
    "evaluate.every": "7",
    "evaluate.also": "[other.txt]",
    "evaluate.prompts": "[Once]",
    "checkpoint.every": "7",
    "checkpoint.keep": "7",
    "tracking.every": "7",
    "tracking.wandb": "offline",
    "tracking.tensorboard": "yes",
    "machine.precision": "bf16",
    "machine.micro_batch": "2",
    "machine.threads": "1",
    "machine.shard": "full",
    "machine.recompute": "yes",
    "machine.exact": "yes",
    "machine.stop_after": "2",
    "machine.compile": "yes",
}


def test_every_key_belongs_to_one_half(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert sorted([*SCIENCE, *MACHINE]) == sorted(flat(recipe))
    assert sorted(science(recipe)) == sorted(SCIENCE)
    for key, other in (SCIENCE | MACHINE).items():
        changed = read(tmp_path, SMALLEST, f"{key}={other}")
        assert changed != recipe, key
        assert (science(changed) != science(recipe)) == (key in SCIENCE), key


# ---------------------------------------------------------------------------------------------- as a person means it


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("train.learning_rate", "1e-3", 0.001),
        ("train.learning_rate", "3E-4", 0.0003),
        ("train.learning_rate", ".5", 0.5),
        ("train.learning_rate", '"0.25"', 0.25),
        ("train.weight_decay", "0", 0.0),
        ("text.validation", "5%", 0.05),
        ("text.validation", "0.5 %", 0.005),
        ("train.decay", "100%", 1.0),
        ("machine.stop_after", "8h", 8.0),
        ("machine.stop_after", "0.1 h", 0.1),
        ("machine.stop_after", "90min", 1.5),
        ("machine.stop_after", "36s", 0.01),
        ("machine.stop_after", "2D", 48.0),
        ("machine.stop_after", "30m", 0.5),
        ("machine.stop_after", "2", 2.0),
        ("seed", "10M", 10_000_000),
        ("seed", "1.5k", 1_500),
        ("seed", "32k", 32_000),
        ("seed", "2 b", 2_000_000_000),
        ("seed", "1e3", 1_000),
        ("seed", "1_000", 1_000),
        ("seed", "012", 12),
        ("seed", '"3"', 3),
        ("seed", "+5", 5),
        ("model.tied", "no", False),
        ("model.tied", "Off", False),
        ("model.tied", "yes", True),
        ("model.tied", "on", True),
        ("model.tied", '"false"', False),
        ("tracking.wandb", "off", "off"),
        ("tracking.wandb", "no", "off"),
        ("tracking.wandb", "Offline", "offline"),
        ("machine.micro_batch", "auto", "auto"),
        ("machine.micro_batch", "4", 4),
        ("run", "2024-01-01", "2024-01-01"),
        ("run", "1e3", "1e3"),
        ("run", "no", "no"),
        ("evaluate.prompts", "[no, 1_000, '']", ["no", "1_000", ""]),
        ("evaluate.prompts", "My self Har", ["My self Har"]),
        ("evaluate.prompts", "[]", []),
        ("text.cache", "~", None),
    ],
)
def test_a_value_is_read_by_the_type_of_its_key(tmp_path: Path, key: str, written: str, meant: Any) -> None:
    section, _, leaf = key.rpartition(".")
    extra = {"text": ", files: [my.txt]", "train": ", steps: 100"}.get(section, "")
    base = (TEXT if section != "text" else "") + ("train: {steps: 100}\n" if section != "train" else "")
    text = base + (f"{section}: {{{leaf}: {written}{extra}}}\n" if section else f"{leaf}: {written}\n")
    assert one(tmp_path, key, text) == meant


@pytest.mark.parametrize(
    ("overrides", "key", "meant"),
    [
        (["train.steps=60"], "train.steps", 60),
        (["train.epochs=2"], "train.epochs", 2.0),
        (["train.epochs=2"], "train.steps", 0),
        (["train.tokens=81920"], "train.steps", 10),
        (["train.steps=6", "train.steps=7"], "train.steps", 7),
        (["seed=1", " seed = 2 "], "seed", 2),
        (["text.files=[a.txt, 'b c.txt']"], "text.files", ["a.txt", "b c.txt"]),
        (["text.files=a,b=c.txt"], "text.files", ["a,b=c.txt"]),
        (["evaluate.prompts=[]"], "evaluate.prompts", []),
        (["text.cache=/data", "text.cache="], "text.cache", None),
        (["text.documents=marker <|end|>"], "text.documents", "marker <|end|>"),
    ],
)
def test_overrides_follow_the_recipe(tmp_path: Path, overrides: list[str], key: str, meant: Any) -> None:
    assert one(tmp_path, key, SMALLEST, *overrides) == meant


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + SMALLEST,
        SMALLEST.replace("\n", "\r\n"),
        "---\n" + SMALLEST + "...\n",
        SMALLEST + "model:\nevaluate: ~\n",
        SMALLEST + "# 世界 \U0001f600\n",
    ],
    ids=["byte order mark", "CRLF", "document marks", "empty sections", "any script"],
)
def test_what_an_editor_adds_changes_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == read(tmp_path)


def test_an_anchor_is_a_value_said_twice(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALLEST + "evaluate: {prompts: &words [Har, Self]}\ntokenizer: {terms: *words}\n")
    assert recipe.tokenizer.terms == recipe.evaluate.prompts == ("Har", "Self")


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"))
        | st.text(" \n\t\r'\":#-[]{},&*!|>@`\\é\u2028\x85\ufeff\U0001f600\x07\x1b~?=<a01.e", max_size=200),
        max_size=4,
    )
)
def test_any_text_comes_back_out_of_the_written_recipe(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    recipe = Recipe(
        run="odd", text=Text(files=("my.txt",)), train=Train(steps=1), evaluate=Evaluate(prompts=tuple(prompts))
    )
    assert read(tmp_path_factory.getbasetemp(), dump(recipe)).evaluate == recipe.evaluate


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sead: 2\n", "sead: did you mean seed?"),
        ("modell: {dim: 8}\n", "modell: did you mean model?"),
        ("model: {dims: 8}\n", "model.dims: did you mean model.dim?"),
        ("model: {n_layers: 8}\n", "model.n_layers: did you mean model.layers?"),
        ("model: {vocabulary: 4096}\n", "model.vocabulary: did you mean tokenizer.vocabulary?"),
        ("dropout: 5%\n", "dropout: did you mean model.dropout?"),
        ("model.dim: 8\n", "write `dim` under `model:`"),
        ("model: {dim.x: 8}\n", "model.dim.x: did you mean model.dim?"),
        ("model: {rope: 8}\n", "model.rope is not a recipe key: model has dim, layers, heads,"),
        ("colour: red\n", "'colour' is not a recipe key: use one of text, tokenizer, model,"),
        ("from_: a/step-1\n", "from_: did you mean from?"),
        ('"a\\nb": 1\n', "'a\\nb' is not a recipe key"),
        ('model: {"\\e[31m": 1}\n', "model.\\x1b[31m is not a recipe key"),
        ("<<: {seed: 5}\n", "'<<' is not a recipe key"),
        ("model: {<<: {dim: 8}}\n", "model.<< takes one value, but has keys under it"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, SMALLEST + text)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=4", "train.stepz: did you mean train.steps?"),
        ("stepz=4", "stepz: did you mean train.steps?"),
        ("model=4", "model is a section: set its keys instead, such as model.dim"),
        ("=4", "'' is not a recipe key"),
        ("train.steps", "override 'train.steps': write it as key=value, for example train.steps=60"),
        ("--check", "override '--check': write it as key=value"),
        ("", "override '': write it as key=value"),
        ("a\nb", r"override 'a\nb': write it as"),
        ("train.steps=", "train.steps has no value"),
        ("text.files=", "text.files is missing"),
        ("text.files=[]", "text.files is empty: name at least one text"),
        ("text.files=[a", "override text.files, line 1 is not YAML"),
        ("evaluate.prompts=[a] b", "override evaluate.prompts, line 1 is not YAML"),
        ("evaluate.prompts=[!!python/name:os.system x]", "python/name:os.system' is refused"),
        ("evaluate.prompts=[*a]", "undefined alias"),
        ("evaluate.prompts=" + "[" * 100_000, "nested too deeply"),
        ("seed=[1, 2]", "seed takes one value, not a list of 2"),
        ("seed=\ud800", "seed contains a NUL or half a character"),
        ("x" * 100_000 + "=1", "is not a recipe key"),
        ("[" * 2_000 + "=[" + "[" * 2_000, "nested too deeply"),
        ("x" * 2_000 + "=[!!int 1]", "is refused: a recipe holds plain values only"),
        ("x" * 2_000, "write it as key=value"),
        ("seed=" + "9" * 100_000, "expected a whole number"),
        ("evaluate.prompts=" + "x" * 70_000, "shorten its lists"),
    ],
    ids=lambda text: text[:30],
)
def test_an_override_that_cannot_be_meant_is_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, SMALLEST, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=many", "seed = 'many': expected a whole number, such as 1000 or 10M"),
        ("machine.stop_after=8h30m", "machine.stop_after = '8h30m': expected a time such as 8h, 90min or 2d"),
        ("machine.stop_after=h", "expected a time"),
        ("train.hours=1h30", "train.hours = '1h30': expected a time such as 8h, 90min or 2d"),
        ("train.weight_decay=1e9epochs", "expected a time constant of 0.001 to 1,000,000 epochs"),
        ("seed=1.5", "seed = 1.5: expected a whole number"),
        ("seed=1e-3", "expected a whole number"),
        ("seed=5%", "expected a whole number"),
        ("seed=0x10", "expected a whole number"),
        ("seed=1:30", "expected a whole number"),
        ("seed=-1", "seed = -1: must be at least 0 and below 4,294,967,296"),
        ("seed=1e999999999", "expected a whole number"),
        ("seed=1e30", "expected a whole number of at most 1e18"),
        ("train.learning_rate=fast", "train.learning_rate = 'fast': expected a number, such as 0.05, 5% or 1e-3"),
        ("train.learning_rate=nan", "expected a number"),
        ("train.learning_rate=-inf", "expected a number"),
        ("train.learning_rate=1e999999999", "expected a number"),
        ("train.learning_rate=1e999", "must be at least 0 and below 10"),
        ("train.learning_rate=true", "expected a number"),
        ("model.dropout=100%", "model.dropout = 100%: must be at least 0 and below 1 (fraction of the features"),
        ("train.decay=1.00005", "train.decay = 1.00005: must be at least 0 and at most 1 (fraction of the run"),
        ("train.steps=0", "train.steps = 0: must be at least 1"),
        ("model.tied=maybe", "model.tied = 'maybe': expected true or false"),
        ("model.tied=1", "expected true or false"),
        ("tracking.wandb=yes", "tracking.wandb = 'yes': expected one of off, offline, online"),
        ("tracking.wandb=onlin", "did you mean online?"),
        ("train.optimizer=sgd", "train.optimizer = 'sgd': expected one of muon, adamw"),
        ("machine.micro_batch=much", "machine.micro_batch = 'much': expected a whole number or auto"),
        ("machine.precision=" + "f" * 100_000, "expected one of auto, fp32, bf16, fp16"),
        ("tokenizer.terms=['']", "tokenizer.terms: each term must be one or more words on one line"),
        ('tokenizer.terms=["a\\nb"]', "tokenizer.terms: each term must be one or more words on one line"),
        ("text.documents=pages", "text.documents = 'pages' is not known: use auto, headings"),
        ("from=quickstart", "expected RUN/step-N"),
        ("from=../other/step-1", "expected RUN/step-N"),
        ("from=other/step-" + "9" * 5_000, "expected RUN/step-N"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_value_is_refused_with_what_was_expected(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, SMALLEST, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALLEST + "seed:\n", "seed has no value"),
        (SMALLEST + "from: ''\n", "from is empty: give it a value"),
        (SMALLEST + "seed: {a: 1}\n", "seed takes one value, but has keys under it"),
        (SMALLEST + "model: {dim: {a: 1}}\n", "model.dim takes one value, but has keys under it"),
        (SMALLEST + "model: 4\n", "model is a section: set its keys instead, such as model.dim"),
        (SMALLEST + "model: [dim, 4]\n", "model is a section"),
        (SMALLEST + "evaluate: {prompts: [a, [b]]}\n", "each item of this list must be a single value"),
        (SMALLEST + "evaluate: {prompts: [a, ~]}\n", "each item of this list must be a single value"),
        (SMALLEST + "? [a, b]\n: 1\n", "line 3: a key must be one word"),
        (SMALLEST + "? " + "a" * 2000 + "\n: 1\n", "line 3: a key must be one word"),
        (SMALLEST + "seed: 1\nseed: 1\n", "line 4: seed appears twice; keep one"),
        (SMALLEST + "train: {steps: 100}\n", "line 3: train appears twice; keep one"),
        (TEXT + "train: {steps: 1, steps: 2}\n", "train, line 2: steps appears twice; keep one"),
        (SMALLEST + "seed: 1\n'seed': 1\n", "line 4: seed appears twice; keep one"),
        ("train: {steps: 1}\n", "text.files is missing and has no default: set it"),
        ("", "is empty: a recipe needs at least text.files"),
        ("# nothing\n", "is empty"),
        ("~\n", "is empty"),
        ("- text\n- train\n", "does not consist of keys"),
        ("wiki.txt\n", "does not consist of keys"),
        (SMALLEST + "---\n" + SMALLEST, "line 3 is not YAML: but found another document"),
        ("text:\n\tfiles: [a]\n", "line 2 is not YAML"),
        (SMALLEST + "run: 'a\n", "is not YAML"),
        (SMALLEST + "run: *other\n", "line 3 is not YAML: found undefined alias"),
        (SMALLEST + "run: a\x07b\n", "is not YAML"),
        (SMALLEST + "run: a\0b\n", "is not YAML"),
        (SMALLEST + 'run: "\\UFFFFFFFF"\n', "is not YAML"),
        (SMALLEST + 'run: "\\U00110000"\n', "is not YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\n" + SMALLEST, "is not YAML"),
        (SMALLEST + 'evaluate: {prompts: ["a\\0"]}\n', "evaluate.prompts contains a NUL or half a character"),
        (SMALLEST + 'evaluate: {prompts: ["\\ud83d"]}\n', "evaluate.prompts contains a NUL or half a character"),
        (b"run: caf\xe9\n", "is not UTF-8 at byte 8: save it as UTF-8"),
        (SMALLEST.encode("utf-16"), "is not UTF-8 at byte 0"),
    ],
    ids=lambda text: str(text)[-30:],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system {text: {files: [a]}, train: {steps: 1}}\n",
        SMALLEST + "seed: !!python/object/apply:os.system ['true']\n",
        SMALLEST + "seed: !!python/name:os.system ''\n",
        SMALLEST + "model: !!python/object:os.system {dim: 8}\n",
        SMALLEST + "evaluate: {prompts: [!!python/name:os.system '']}\n",
        SMALLEST + "? !!python/name:os.system seed\n: 1\n",
        SMALLEST + "run: !!binary aGFy\n",
        SMALLEST + "run: !!timestamp 2024-01-01\n",
        SMALLEST + "seed: !!int 5\n",
        SMALLEST + "evaluate: {prompts: !!set {a, b}}\n",
        SMALLEST + "evaluate: {prompts: !!omap [a: b]}\n",
        SMALLEST + "run: !mine har\n",
        SMALLEST + "run: !<tag:yaml.org,2002:a%0Ab> har\n",
    ],
)
def test_a_tag_is_refused(tmp_path: Path, text: str) -> None:
    assert "is refused: a recipe holds plain values only" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        SMALLEST + "evaluate: &again {prompts: *again}\n",
        SMALLEST + "evaluate: {prompts: &again [*again]}\n",
        SMALLEST + "model: &again\n  <<: *again\n",
        "&again {text: *again, train: *again}\n",
    ],
)
def test_a_recipe_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text)


LARGEST = 60_000  # characters, just under the limit of a recipe file


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "run: " + "[" * LARGEST,
        "run: " + "{a: " * (LARGEST // 4),
        "? " * (LARGEST // 2),
        "\n".join(" " * depth + "a:" for depth in range(340)),
        "#" * 10_000_000,
        "run: " + "a" * LARGEST,
        "seed: " + "1" * LARGEST,
        "a" * LARGEST + ": 1",
        'run: "' + "\\n" * (LARGEST // 2) + '"',
        "run: [" + "[]," * (LARGEST // 3) + "]",
        "evaluate: {prompts: [" + "a," * (LARGEST // 2) + "]}",
        "run: !" + "%41" * (LARGEST // 3) + " a",
        "\n".join(f"k{each}: 1" for each in range(7_000)),
        "\n" * LARGEST + "?",
    ],
    ids=lambda text: text[:12],
)
def test_a_file_made_to_hurt_is_refused_in_no_time(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, SMALLEST + text)


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "small.yaml/x", "a" * 300, "a\0b", "\ud800"])
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    read(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / name)
    assert line_of(caught.value)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../other", "a/b", "/a", "a\\b", "C:a", "a b", "-a", ".a", "a\n", "a" * 101, "é", "~"],
)
def test_the_name_of_a_run_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    assert "it names a folder under runs/: say run=NAME" in refused(tmp_path, SMALLEST + f"run: {json.dumps(name)}\n")


@pytest.mark.parametrize("name", ["a", "_", "2024-01-01", "a.b-c_D", "a" * 100])
def test_an_ordinary_name_of_a_run_is_taken(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, SMALLEST, f"run={name}").run == name


@pytest.mark.parametrize(
    ("given", "words", "mend"),
    [
        (["model.dim=256", "model.heads=7"], "set model.head_dim, for example 36", "model.head_dim=36"),
        (["model.heads=2000"], "set model.head_dim, for example 2", "model.head_dim=2"),
        (["model.head_dim=33"], "even number, for example 34", "model.head_dim=34"),
        (["model.dim=12", "model.heads=4"], "model.head_dim = 3: rotary positions need an even", "model.head_dim=4"),
        (["model.heads=8", "model.kv_heads=3"], "use one of [1, 2, 4, 8]", "model.kv_heads=4"),
        (["model.kv_heads=8"], "use one of [1, 2, 4]", "model.kv_heads=4"),
        (
            ["train.tokens_per_step=1000"],
            "is not a multiple of model.context = 512: try 1024",
            "train.tokens_per_step=1024",
        ),
        (["train.tokens_per_step=1"], "try 512", "train.tokens_per_step=512"),
        (["machine.micro_batch=3"], "does not divide the number of windows in a step, 16", "machine.micro_batch=2"),
        (["machine.micro_batch=100"], "try 16", "machine.micro_batch=16"),
        (["model.context=2", "train.tokens_per_step=9999999986", "machine.micro_batch=999999999"], "try", None),
        (["tokenizer.vocabulary=268", "tokenizer.terms=[a, b]"], "at least 270", "tokenizer.vocabulary=270"),
        (["train.warmup=61"], "overlap where train.steps = 100: use at most train.warmup=60", "train.warmup=60"),
        (["train.warmup=1", "train.decay=100%"], "overlap", "train.decay=99%"),
    ],
)
def test_an_impossible_combination_is_refused_and_its_mend_helps(
    tmp_path: Path, given: list[str], words: str, mend: str | None
) -> None:
    assert words in refused(tmp_path, SMALLEST, *given)
    if mend:
        read(tmp_path, SMALLEST, *given, mend)


@pytest.mark.parametrize("lengths", ["", "steps: 1, tokens: 8192", "tokens: 8192, epochs: 1", "steps: 1, epochs: 1"])
def test_a_run_has_exactly_one_length(tmp_path: Path, lengths: str) -> None:
    line = refused(tmp_path, TEXT + f"train: {{{lengths}}}\n")
    assert "a run needs exactly one of train.steps, train.tokens, train.epochs" in line
    assert read(tmp_path, TEXT + f"train: {{{lengths}}}\n", "train.steps=5").train.steps == 5


def test_overrides_say_one_length_at_most(tmp_path: Path) -> None:
    line = refused(tmp_path, SMALLEST, "train.tokens=2M", "train.steps=20")
    assert "train.steps and train.tokens given: a run needs exactly one of" in line


def test_warm_up_and_decay_meet_a_length_in_epochs_when_it_is_known(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALLEST, "train.epochs=2", "train.warmup=100")
    assert with_steps(recipe, tokens_per_epoch=1_000_000).train.steps == 244
    with pytest.raises(RecipeError, match=r"overlap where train.steps = 24"):
        with_steps(recipe, tokens_per_epoch=100_000)


@pytest.mark.parametrize("written", ["0.5 epochs", "0.5epochs", ".5 Epochs", "0.50 epoch"])
def test_weight_decay_may_be_the_epochs_over_which_weights_forget(tmp_path: Path, written: str) -> None:
    recipe = read(tmp_path, SMALLEST, f"train.weight_decay={written}", "train.learning_rate=0.02")
    assert recipe.train.weight_decay == "0.5 epochs"
    assert read(tmp_path, dump(recipe)) == recipe
    known = with_steps(recipe, tokens_per_epoch=1_000_000)
    rate, decay, steps = 0.02, float(known.train.weight_decay), 1_000_000 / known.train.tokens_per_step
    assert (1 - rate * decay) ** (0.5 * steps) == pytest.approx(math.exp(-1), rel=0.01)  # after half an epoch
    assert with_steps(known, tokens_per_epoch=1_000_000) == known


def test_a_time_constant_asks_for_no_more_decay_than_pays(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALLEST, "train.weight_decay=1 epochs")
    assert with_steps(recipe, tokens_per_epoch=10_000).train.weight_decay == MAX_DECAY


@pytest.mark.parametrize("written", ["0 epochs", "-1 epochs", "epochs", "many epochs", "1e9 epochs"])
def test_a_time_constant_that_is_none_is_refused(tmp_path: Path, written: str) -> None:
    assert "train.weight_decay = " in refused(tmp_path, SMALLEST, f"train.weight_decay={written}")


def test_auto_goes_by_how_often_the_text_is_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALLEST, "model.dropout=auto", "train.weight_decay=auto", "train.steps=100")
    read_tokens = 100 * recipe.train.tokens_per_step
    found = {}
    for epochs in (0.5, 4, 20):
        known = with_steps(recipe, tokens_per_epoch=int(read_tokens / epochs))
        found[epochs] = (known.model.dropout, known.train.weight_decay)
    assert [dropout for dropout, _ in found.values()] == [0.0, 0.0, MANY_EPOCHS_DROPOUT]
    decays = [float(decay) for _, decay in found.values()]
    assert decays == sorted(decays) and decays[0] == 0.1 < decays[2]  # the less text, the sooner it is forgotten


# ---------------------------------------------------------------------------------------------- mutated

KEYS = sorted(SCIENCE | MACHINE)
LEAVES = sorted({key.rpartition(".")[2] for key in KEYS} | {key.partition(".")[0] for key in KEYS})
NASTY = [
    *(
        "",
        "~",
        "0",
        "-1",
        "-0",
        "1e-3",
        "1e999999999",
        "1e400",
        "nan",
        "-inf",
        "5%",
        "-5%",
        "10M",
        "1_000",
        "012",
        "0x1F",
    ),
    *("9" * 30, "0." + "0" * 400 + "1", "1:30", "2024-01-01", "yes", "off", "auto", "null", "''", '"\\n"', '"\\0"'),
    *('"\\ud800"', '"\\UFFFFFFFF"', "[]", "[1, 2]", "[[a]]", "{}", "{a: 1}", "[a", "{a", "'", "*a", "&a 1", "&a [*a]"),
    *(
        "!!int 1",
        "!!binary aGFy",
        "!!python/name:os.system",
        "!x 1",
        "|",
        ">-",
        "<<",
        "../..",
        "/",
        "..\\..",
        "C:\\",
        "é",
    ),
    *(
        "\u2028",
        "\x85",
        "\U0001f600",
        "a" * 300,
        "[" * 2000,
        "%",
        "@",
        "`",
        "\t",
        "- a",
        "? a",
        "a: b",
        "# a",
        "7",
        "33",
    ),
]
FRAGMENTS = st.sampled_from(
    [*NASTY, *"\n\r\t :-?[]{},#&*!|>'\"%@`\\", "\n---\n", "\n...\n", ": ", "\n  ", "\ufeff", "\x1b"]
)


def places(draw: st.DrawFn, text: str) -> tuple[int, int]:
    """The bounds of a short part of `text`."""
    begin = draw(st.integers(0, len(text)))
    return begin, begin + draw(st.integers(0, 4))


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A shipped recipe after a few accidents: characters edited, lines swapped, values replaced, keys renamed."""
    text = draw(st.sampled_from([path.read_text("utf-8") for path in SHIPPED]))
    for accident in draw(st.lists(st.sampled_from(["edit", "swap", "value", "key", "indent", "repeat"]), min_size=1)):
        lines = text.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        if accident == "edit":
            begin, end = places(draw, text)
            text = text[:begin] + draw(FRAGMENTS | st.text(st.characters(codec="utf-8"), max_size=3)) + text[end:]
            continue
        if accident == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif accident == "value" and colon:
            lines[at] = f"{key}: {draw(st.sampled_from(NASTY))}"
        elif accident == "key" and colon:
            indent = " " * (len(key) - len(key.lstrip()))
            lines[at] = indent + draw(st.sampled_from(LEAVES + NASTY)) + lines[at][len(key) :]
        elif accident == "indent":
            lines[at] = " " * draw(st.integers(0, 5)) + lines[at].lstrip()
        elif accident == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
        text = "\n".join(lines)
    return text


@st.composite
def overridden(draw: st.DrawFn) -> list[str]:
    """Few overrides, most of them of a key that there is."""
    keys = st.sampled_from(KEYS) | st.sampled_from(NASTY)
    return draw(st.lists(st.builds("{}={}".format, keys, st.sampled_from(NASTY) | st.text(max_size=5)), max_size=2))


def check_read_or_refused(path: Path, text: str, overrides: list[str]) -> None:
    """The recipe is refused in one line, or can be written out and read again as the same; both in no time."""
    path.write_bytes(text.encode())
    began = time.process_time()
    try:
        recipe = load(path, overrides)
    except RecipeError as error:
        assert line_of(error)
        event("refused")
    else:
        event("read")
        path.write_bytes(dump(recipe).encode())
        assert load(path) == recipe
    assert time.process_time() - began < 2 * SECONDS


@settings(max_examples=MUTATED, deadline=None, print_blob=True)
@given(text=mutated(), overrides=overridden())
def test_a_mutated_recipe_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    check_read_or_refused(tmp_path_factory.getbasetemp() / "mutated.yaml", text, overrides)


@pytest.mark.slow
@settings(max_examples=MUTATED_SLOWLY, deadline=None, print_blob=True)
@given(text=mutated(), overrides=overridden())
def test_a_thousand_mutated_recipes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    check_read_or_refused(tmp_path_factory.getbasetemp() / "mutated.yaml", text, overrides)


@pytest.mark.parametrize("name", ["best", "newest", "checkpoints", "step-5", "step-000005", "step-by-step"])
def test_a_name_that_stands_for_a_checkpoint_is_no_run_s_name(tmp_path: Path, name: str) -> None:
    said = refused(tmp_path, SMALLEST, f"run={name}")
    assert f"run={said.rpartition('run=')[2]}" == f"run=my-{name}"
    assert read(tmp_path, SMALLEST, f"run=my-{name}").run == f"my-{name}"
    kept_before = with_checksum(dump(read(tmp_path)).replace("format: 3\n", "").replace("run: small", f"run: {name}"))
    assert read(tmp_path, kept_before).run == name, "an earlier version trained it"


def test_skip_counts_steps_from_1_but_in_what_runs_kept_before(tmp_path: Path) -> None:
    with_skip = TEXT + "train: {steps: 100, skip: [0, 4-5]}\n"
    assert "steps count from 1" in refused(tmp_path, with_skip)
    assert one(tmp_path, "train.skip", TEXT + "train: {steps: 100, skip: [1, 4-5]}\n") == ["1", "4-5"]
    assert one(tmp_path, "train.skip", with_skip + "format: 1\n") == ["1", "5-6"]
    assert one(tmp_path, "train.skip", with_skip + "format: 1\n", "train.skip=[4-5]") == ["4-5"], "is of today"
    assert one(tmp_path, "train.skip", with_checksum(with_skip)) == ["1", "5-6"]
    again = with_checksum(dump(read(tmp_path, with_checksum(with_skip))))
    assert one(tmp_path, "train.skip", again) == ["1", "5-6"], "translated once"
    assert "this version reads 1 to 3" in refused(tmp_path, SMALLEST + "format: 4\n")
    edited = with_checksum(with_skip).replace("steps: 100", "steps: 101")
    with pytest.raises(RefusedError, match=r"delete that line and write `format: 1` there"):
        read(tmp_path, edited)


def test_a_list_that_aliases_make_huge_is_refused_in_no_time(tmp_path: Path) -> None:
    items = ", ".join(["&a " + "x" * 30_000, *["*a"] * 6_000])
    assert "shorten" in refused(tmp_path, f"text: {{files: [{items}]}}\ntrain: {{steps: 20}}\n")


def test_a_flipped_bit_in_the_line_of_the_digest_is_noticed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = with_checksum(dump(load_recipe("quickstart"))).encode()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for bit in range(8 * last, 8 * (len(whole) - 1)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(LLMError, match=r"recipe\.yaml"):
            load(path)
