"""The main command: what it leaves, what it says, and one clear line with the right status for whatever is wrong."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import is_initialized
from safetensors import safe_open

from llm.base import atomic_io
from llm.base.errors import StoppedError
from llm.config.reading import load
from llm.interop.pretrained import ready
from llm.run_folder import checkpoint, trace
from llm.training import session
from llm.training.micro_batch import MicroBatches
from llm.training.trainer import Trainer
from tests.forks import (
    ROOT,
    Ended,
    count_threads,
    digest,
    ended,
    run,
    run_group,
    script,
    start,
    train,
    write_recipe,
    write_text,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder in which the run `tiny` is finished, with its recipe beside."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(train(write_recipe(folder, text, **{"evaluate.prompts": "[My self Har]", "checkpoint.keep": 2})), folder)
    assert done.status == 0, done.err
    (folder / "said.txt").write_text(done.out)
    return folder


def refused(done: Ended, status: int, *words: str) -> None:
    """One line on stderr with these words, this status, no traceback."""
    assert done.status == status, done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err


@pytest.mark.parametrize(("name", "mend"), [("smaple", "did you mean sample?"), ("xyz", "`onetext --help` lists")])
def test_a_command_that_onetext_does_not_know_is_one_line(name: str, mend: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from llm.cli import main; main()", name], capture_output=True, text=True
    )
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.count("\n") == 1 and f"error: onetext {name}: no such command; {mend}" in ended.stderr


def test_a_run_says_what_is_coming_and_how_to_sample_it(trained: Path) -> None:
    said = (trained / "said.txt").read_text()
    before, _, after = said.partition("step  1/12")
    assert all(word in before for word in ("parameters", "12 steps", "epochs", "about"))
    assert "My self Har|" in after and "bits per byte" in after
    assert after.rstrip().endswith('python -m llm.sample tiny --prompt "My self Har"')


def test_what_a_run_says_fits_a_terminal(trained: Path) -> None:
    said = re.sub(r"/\S+/cache/", "data/", (trained / "said.txt").read_text())  # a recipe's default, relative
    lines = said.splitlines()
    assert not [line for line in lines if re.search(r"[0-9a-f]{40}", line)]
    assert not [line for line in lines if len(line) > 80 and not line.startswith("  ")]  # of samples, which may


def test_a_run_folder_holds_all_of_the_run(trained: Path) -> None:
    folder = trained / "runs/tiny"
    assert {path.name for path in folder.iterdir()} >= {
        "recipe.yaml", "tokenizer", "shards.json", "checkpoints", "metrics.jsonl", "machine.json"}  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 13))
    assert all(line.keys() >= {"learning_rate", "gradient_norm", "tokens_per_second", "epoch"} for line in losses)
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [5, 10, 12]
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_checkpoints_are_safetensors_under_hugging_faces_names(trained: Path) -> None:
    newest = checkpoint.newest(trained / "runs/tiny", print)
    assert newest is not None and newest.step == 12
    with safe_open(newest.folder / "model.safetensors", "pt") as file:
        assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_norm.weight", "model.norm.weight"} <= set(
            file.keys()
        )
    best = checkpoint.best(trained / "runs/tiny")
    kept = {folder.name for folder in checkpoint.folders(trained / "runs/tiny")}
    assert best is not None and kept == {"step-000012", "step-000010", best.folder.name}


def test_a_finished_run_does_nothing_and_names_the_way_on(trained: Path) -> None:
    before = digest(trained)
    again = run(train(trained / "recipe.yaml"), trained)
    assert again.status == 0 and "nothing to do" in again.out and "from=tiny/step-000012" in again.out
    assert digest(trained) == before
    way_on = next(word for word in again.out.split() if word.startswith("train.steps="))
    followed = run(train(trained / "recipe.yaml", "run=followed", "from=tiny/step-000012", way_on), trained)
    assert followed.status == 0 and "step 24/24" in followed.out, followed.err


def test_another_science_half_is_refused_with_the_first_key_and_both_ways_on(trained: Path) -> None:
    ended = run(train(trained / "recipe.yaml", "train.learning_rate=0.01", "model.dropout=0"), trained)
    refused(ended, 4, "model.dropout = 0.1", "run=NAME", "from=tiny/step-000012")


def test_a_refused_start_leaves_the_record_of_the_run_s_ending(trained: Path) -> None:
    before = (trained / "runs/tiny/status.json").read_bytes()
    assert run(train(trained / "recipe.yaml", "train.steps=500"), trained).status == 4
    assert (trained / "runs/tiny/status.json").read_bytes() == before and b"finished" in before


@pytest.mark.parametrize("world", [1, 2])
def test_a_refused_first_start_leaves_no_folder(trained: Path, world: int) -> None:
    act = train(trained / "recipe.yaml", "run=wider", "from=tiny/step-000012", "model.dim=64", "train.steps=24")
    assert [each.status for each in run_group(act, trained, world)] == [4] * world
    assert not (trained / "runs/wider").exists()
    (trained / "runs/wider").mkdir()
    said = run(script("module:llm.sample", "nobody", "--prompt", "x"), trained)
    assert said.status == 2 and "tiny" in said.err and "wider" not in said.err, said.err
    assert run(act, trained).status == 4
    assert (trained / "runs/wider").is_dir(), "it was there before"
    shutil.rmtree(trained / "runs/wider")


def test_another_machine_half_is_taken(trained: Path) -> None:
    ended = run(
        train(trained / "recipe.yaml", "machine.micro_batch=4", "tracking.every=3", "evaluate.every=2"), trained
    )
    assert ended.status == 0, ended.err


def test_another_text_is_named_before_what_follows_from_it(tmp_path: Path) -> None:
    """Under a length in epochs and decay by it the steps and the decay differ too, and the trained tokenizer."""
    keys = {"train.steps": None, "train.epochs": 1.5, "train.weight_decay": "auto", "model.dropout": "auto"}
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"), **keys)
    assert run(train(recipe, stop_after=3), tmp_path).status == 75
    other = f"text.files={write_text(tmp_path / 'other.txt', documents=75)}"
    said = "run tiny was trained with another text ("
    ended = run(train(recipe, other), tmp_path)
    refused(ended, 4, said)
    way_on = ended.err.partition("start a new run from it with run=NAME ")[2].split()
    assert run(train(recipe, other, "run=onward", *way_on), tmp_path).status == 0, way_on
    own = (tmp_path / "runs/tiny/tokenizer/tokenizer.model").rename(tmp_path / "own.model")
    refused(run(train(recipe, other, f"tokenizer.path={own}"), tmp_path), 4, "run tiny was trained with another text (")


def test_the_key_that_was_changed_is_named_before_what_follows_from_it(tmp_path: Path, text: Path) -> None:
    keys = {"train.steps": None, "train.epochs": 1, "train.weight_decay": "auto", "model.dropout": "auto"}
    recipe = write_recipe(tmp_path, text, **keys)
    assert run(train(recipe, stop_after=3), tmp_path).status == 75
    for change, said in {
        "train.tokens_per_step=128": "train.tokens_per_step = 64, this recipe says 128",
        "train.epochs=9": "train.steps = ",
        "train.learning_rate=0.01": "train.learning_rate = 0.02",
        "train.weight_decay=0.5": "train.weight_decay = ",
        "text.validation=0.3": "text.validation = 0.1",
        "tokenizer.vocabulary=330": "tokenizer.vocabulary = 320",
    }.items():
        refused(run(train(recipe, change), tmp_path), 4, f"run tiny was trained with {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.layers=4", "model.layers = 2, this recipe 4"),
        ("model.heads=4", "model.heads = 2, this recipe 4"),
        ("model.ffn_dim=64", "model.ffn_dim = 128, this recipe 64"),
        ("model.tied=false", "model.tied = True, this recipe False"),
    ],
)
def test_from_another_size_is_refused_by_its_name(trained: Path, change: str, said: str) -> None:
    ended = run(train(trained / "recipe.yaml", "run=other", "from=tiny/step-12", "train.steps=15", change), trained)
    refused(ended, 4, f"from = tiny/step-000012 has {said}: use runs/tiny/recipe.yaml")
    refused(run(train(trained / "recipe.yaml", change), trained), 4, said.split(",")[0])
    assert "from=" not in run(train(trained / "recipe.yaml", change), trained).err  # which would be refused


@pytest.mark.parametrize(
    ("skip", "mend"),
    [("[3-5]", "[]"), ("[12]", "[]"), ("[5-30]", "[]"), ("[2,14]", "[14-14]"), ("[13,99]", None)],
)
def test_from_leaves_out_no_batch_that_was_read(trained: Path, skip: str, mend: str | None) -> None:
    def start(skip: str) -> Ended:
        return run(train(trained / "recipe.yaml", "run=skips", "from=tiny/step-12", "train.steps=15", skip), trained)

    ended = start(f"train.skip={skip}")
    if mend is None:
        refused(ended, 2, "train.skip = 99 lies beyond the run's 15 steps")
    else:
        refused(ended, 4, "from = tiny/step-000012 has train.skip = nothing, this recipe", f"'train.skip={mend}'")
        assert start(f"train.skip={mend}").status == 0
        shutil.rmtree(trained / "runs/skips")


def test_from_keeps_what_its_parent_left_out(trained: Path) -> None:
    def start(*changes: str) -> Ended:
        return run(train(trained / "recipe.yaml", *changes), trained)

    assert start("run=plain", "train.steps=16").status == 0
    assert start("run=parent", "train.skip=[2-3,8]", "train.steps=9").status == 0
    child = ("run=child", "from=parent/step-9", "train.steps=12")
    refused(start(*child, "train.skip=[2-3,14]"), 4, "has train.skip = 2-3, 8,", "'train.skip=[2-3,8-8,14-14]'")
    assert start(*child, "train.skip=[2-3,8-8,14-14]").status == 0
    read = {name: [line["windows"] for line in trace.read(trained / "runs" / name)] for name in ("plain", "child")}
    assert read["child"] == [read["plain"][batch - 1] for batch in (13, 15, 16)]


def test_from_another_optimizer_or_another_beginning_is_refused_with_the_way_on(trained: Path) -> None:
    def start(*changes: str) -> Ended:
        return run(train(trained / "recipe.yaml", "run=other", "train.steps=15", *changes), trained)

    ended = start("from=tiny/step-12", "train.optimizer=adamw")
    refused(ended, 4, "train.optimizer = muon, this recipe adamw: say train.optimizer=muon, or", "model.from=runs/tiny")
    assert start(ended.err.split()[-1], "train.optimizer=adamw").status == 0
    shutil.rmtree(trained / "runs/other")
    ended = start("from=tiny/step-12", "model.from=runs/tiny/best")
    refused(ended, 4, "has model.from = nothing, this recipe runs/tiny/best: leave it out")
    assert not (trained / "runs/other").exists()


def test_step_12_and_step_000012_are_one_checkpoint(trained: Path) -> None:
    def started(name: str) -> Ended:
        return run(train(trained / "recipe.yaml", "run=same", f"from=tiny/{name}", "train.steps=14"), trained)

    assert started("step-12").status == 0
    again = started("step-000012")
    assert again.status == 0 and "nothing to do" in again.out, again.err
    manifest = trained / "runs/same/checkpoints/step-000014/checkpoint.json"
    kept = {name: value for name, value in atomic_io.read_checksummed(manifest).items() if name != "sha256"}
    atomic_io.write_checksummed(
        manifest, kept | {"science": kept["science"] | {"from": "tiny/step-12"}}
    )  # as it was once kept
    again = started("step-000012")
    assert again.status == 0 and "nothing to do" in again.out, again.err


def prompted(folder: Path, text: Path, **changes: object) -> tuple[str, list[str]]:
    """The prompt of the last line of a run, and those of its samples."""
    done = run(train(write_recipe(folder, text, **{"train.steps": 5, "train.warmup": 0, **changes})), folder)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    said = done.out.splitlines()[-1].removeprefix("  python -m llm.sample tiny --prompt ")
    return shlex.split(said)[0], [line["prompt"] for line in lines if "sample" in line]


def test_a_text_of_ones_own_is_asked_to_go_on_with_itself(tmp_path: Path, text: Path) -> None:
    code = tmp_path / "code.txt"
    code.write_text("".join(f'print("$HOME {n} `ls` and something more to print")\n\n\n' for n in range(60)))
    rule = {"text.documents": "blank-lines", "tokenizer.vocabulary": 300}
    assert prompted(tmp_path, code, **rule)[1] == []
    shutil.rmtree(tmp_path / "runs")
    opening, samples = prompted(tmp_path, code, **rule, **{"evaluate.prompts": "auto"})
    assert opening.startswith('print("$HOME ') and len(opening) <= 32 and samples == [opening]
    assert load(tmp_path / "runs/tiny/recipe.yaml").evaluate.prompts == (opening,)
    card = (tmp_path / "runs/tiny/checkpoints/step-000005/README.md").read_text()
    assert "print(say(" in card and "HOME" in card
    shutil.rmtree(tmp_path / "runs")
    assert prompted(tmp_path, code, **rule, **{"evaluate.prompts": "[One, Two]"})[0] == "One"


def test_without_a_validation_side_prompts_are_shown_all_the_same(tmp_path: Path, text: Path) -> None:
    keys = {"text.validation": 0, "evaluate.prompts": "[The river]", "evaluate.every": 2}
    assert prompted(tmp_path, text, **keys) == ("The river", ["The river"] * 3)


def test_from_takes_weights_moments_and_step_along(trained: Path) -> None:
    ended = run(train(trained / "recipe.yaml", "run=longer", "from=tiny/step-000012", "train.steps=15"), trained)
    assert ended.status == 0 and "from step 12" in ended.out, ended.err
    newest = checkpoint.newest(trained / "runs/longer", print)
    assert newest is not None and newest.step == 15 and newest.manifest["parent"]["from"] == "tiny/step-000012"


@pytest.mark.parametrize("length", ["train.steps=12", "train.steps=3", "train.tokens=768", "train.epochs=0.01"])
def test_a_length_that_ends_where_from_begins_is_refused_with_one_that_does_not(trained: Path, length: str) -> None:
    arguments = ("run=none", "from=tiny/step-000012", "train.warmup=0")
    ended = run(train(trained / "recipe.yaml", *arguments, length), trained)
    name, _, value = length.partition("=")
    refused(ended, 2, f"{name} = {value}", "from = tiny/step-000012", "lengths count from step 0", f"say {name}=")
    assert not (trained / "runs/none").exists(), "no empty run is left"
    mend = ended.err.partition(f"say {name}=")[2].split()[0]
    if name != "train.epochs":  # which needs the text
        assert load(trained / "recipe.yaml", [*arguments, f"{name}={mend}"]).train.steps > 12


@pytest.mark.parametrize("plan", [[[0, 12]], [[20, 30]]])
def test_a_plan_that_does_not_go_on_from_where_the_run_begins_is_refused(
    tmp_path: Path, trained: Path, plan: list[list[int]]
) -> None:
    atomic_io.write_checksummed(
        trained / "runs/planned/plan.json", {"hours": 0.01, "plan": plan, "seconds": 1.0, "finished": True}
    )
    ended = run(train(trained / "recipe.yaml", "run=planned", "from=tiny/step-000012", "train.hours=0.01"), trained)
    refused(ended, 4, "plan.json plans steps", "step 12", "another run's plan")


def test_a_second_run_in_the_same_folder_is_refused(trained: Path) -> None:
    with atomic_io.lock(trained / "runs/tiny/lock") as mine:
        assert mine
        refused(run(train(trained / "recipe.yaml"), trained), 4, "tiny", "held")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ("train.stepz", "did you mean train.steps?")),
        ("train.steps=many", ("train.steps", "'many'", "whole number")),
        ("text.files=nowhere.txt", ("nowhere.txt", "is not there", "python -m llm.prepare --wiki")),
        ("text.files=empty.txt", ("empty.txt",)),
        ("text.files=short.txt", ("short.txt", "one document", "use more text", "text.validation=0")),
        ("machine.precision=fp16", ("fp16", "CUDA")),
        ("machine.micro_batch=3", ("machine.micro_batch = 3", "try 2")),
        ("run=../out", ("run", "../out")),
        ("from=nowhere/step-000001", ("nowhere/step-000001",)),
    ],
)
def test_what_is_wrong_is_one_line_with_status_2(
    tmp_path: Path, text: Path, override: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Too short.\n")
    ended = run(train(write_recipe(tmp_path, text), override), tmp_path)
    refused(ended, 2, *words)
    assert not list((tmp_path).glob("runs/*/checkpoints/*"))


def sample(folder: Path, *arguments: str) -> Ended:
    return run(script("module:llm.sample", *arguments), folder)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.teachers=runs/nobody/best", "train.teachers: there is no run 'runs/nobody/best'"),
        ("train.teachers=nobody", "train.teachers: nobody/config.json is not there"),
        ("from=nobody/step-000001", "from = nobody/step-000001 is not there"),
        ("evaluate.also=nowhere.txt", "nowhere.txt is not there"),
        ("text.documents=pages", "text.documents = 'pages' is not known"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_the_text_is_prepared(
    tmp_path: Path, override: str, word: str
) -> None:
    ended = run(train(write_recipe(tmp_path, write_text(tmp_path / "text.txt")), override), tmp_path)
    refused(ended, 2, word)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


def test_sampling_takes_the_last_run_and_a_seed_says_the_same_twice(trained: Path) -> None:
    first = sample(trained, "--prompt", "My self Har", "--seed", "3", "--tokens", "30")
    assert first.status == 0 and first.out.startswith("My self Har") and len(first.out) > 20
    assert "tokens/s" in first.err
    assert sample(trained, "--prompt", "My self Har", "--seed", "3", "--tokens", "30").out == first.out


@pytest.mark.parametrize("prompt", ["", "word " * 100, "漢字 ไทย 🎉", "\n\n", "\udc80"])
def test_any_prompt_gives_text(trained: Path, prompt: str) -> None:
    ended = sample(trained, "tiny", "--prompt", prompt, "--tokens", "20", "--temperature", "0")
    assert ended.status == 0 and "Traceback" not in ended.err, ended.err


def test_several_prompts_go_side_by_side_as_each_would_alone(trained: Path) -> None:
    alone = [
        sample(trained, "--prompt", each, "--tokens", "12", "--temperature", "0").out for each in ("My self Har", "The")
    ]
    both = sample(trained, "--prompt", "My self Har", "--prompt", "The", "--tokens", "12", "--temperature", "0").out
    assert both == "".join(f"{text}{'-' * 40}\n" for text in alone)


@pytest.mark.parametrize("arguments", [("nowhere",), ("--top-p", "0"), ("--tokens", "-1"), ("tiny/step-000099",)])
def test_a_wrong_argument_is_one_line(trained: Path, arguments: tuple[str, ...]) -> None:
    refused(sample(trained, "--prompt", "x", *arguments), 2)


@pytest.mark.parametrize("arguments", [(), ("a.yaml", "--chek"), ("a.yaml", "--check=1")])
def test_a_wrong_usage_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = run(script(ROOT / "launch" / "train.py", *arguments), tmp_path)
    refused(ended, 2, "error: ", "recipe" if not arguments else "--che", "--help")
    assert "key=value" not in ended.err
    refused(run(script("module:llm.sample", "--tokens"), tmp_path), 2, "--tokens: expected one argument")


def test_evaluate_says_what_training_said(trained: Path) -> None:
    ended = run(script("module:llm.evaluate", "tiny/newest"), trained)
    lines = [json.loads(line) for line in (trained / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    told = next(line["bits_per_byte"] for line in reversed(lines) if "bits_per_byte" in line)
    assert f"bits per byte         {told:.4f}" in ended.out and "perplexity a word" in ended.out


def test_evaluate_takes_any_text(trained: Path) -> None:
    (trained / "other.txt").write_text("A text of its own, with some words.\n")
    ended = run(script("module:llm.evaluate", "tiny", "--text", "other.txt"), trained)
    assert ended.status == 0 and "36 bytes" in ended.out, ended.err


@pytest.mark.parametrize("verb", ["prepare", "sample", "evaluate"])
def test_help_is_there_before_anything_slow(tmp_path: Path, verb: str) -> None:
    ended = run(script(f"module:llm.{verb}", "--help"), tmp_path)
    assert ended.status == 0 and "usage: python -m llm." in ended.out


@pytest.mark.parametrize("recompute", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiler", [pytest.param("there", marks=pytest.mark.slow), "missing"])
def test_compiled_blocks_are_said_with_their_cost_or_done_without(
    tmp_path: Path, text: Path, compiler: str, recompute: str
) -> None:
    if compiler == "there" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    recipe = write_recipe(tmp_path, text, **{
        "machine.compile": "true", "machine.recompute": recompute, "train.steps": 3, "train.warmup": 0})  # fmt: skip

    def act() -> None:
        kept, first = [], MicroBatches._forward_backward

        def keeping(self: MicroBatches, size: int) -> float:
            try:
                return first(self, size)
            except Exception as error:
                kept.append(error)  # as a compiler's own threads may: what its frames hold must not live on with it
                raise

        MicroBatches._forward_backward = keeping  # type: ignore[method-assign]
        if compiler == "missing":
            import torch._inductor.config

            torch._inductor.config.cpp.cxx = (None, "/no/compiler")
        train(recipe)()

    done = ended(start(act, tmp_path, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}), tmp_path)
    assert done.status == 0, done.err
    assert ("going on without" if compiler == "missing" else "the blocks were compiled in") in done.out


def test_a_run_in_a_process_of_ones_own_leaves_it_as_it_was(tmp_path: Path, text: Path) -> None:
    """Two of other precisions in turn, and one that is stopped."""
    path = write_recipe(tmp_path, text, **{"machine.threads": 2, "train.steps": 3, "train.warmup": 1})

    def found() -> list[object]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        modes = [torch.get_num_threads(), torch.get_deterministic_debug_mode(), len(warnings.filters)]
        return [dict(os.environ), handlers, modes, is_initialized(), torch.distributed.is_initialized()]

    def act() -> None:
        models, init = [], Trainer.__init__
        count_threads()

        def kept(self: Trainer, *given: Any, **named: Any) -> None:
            init(self, *given, **named)
            models.append(weakref.ref(self.state.model))

        Trainer.__init__ = kept  # type: ignore[method-assign]
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor"
        import_module("llm.data.sources").lean_datasets()
        before, last = found(), None
        for precision, until in (("fp32", -1), ("bf16", -1), ("fp32", 1)):
            try:
                recipe = load(path, [f"machine.precision={precision}", f"run={precision}{until + 1}"])
                session.train(recipe, lambda recipe: ready(recipe, lambda line: None), until)
            except StoppedError as error:
                last = error
            assert found() == before
        gc.collect()
        assert last is not None and [model() for model in models] == [None] * 3

    done = run(act, tmp_path)
    assert done.status == 0, done.err


def test_a_run_goes_on_from_within_its_own_folder(tmp_path: Path, text: Path) -> None:
    stopped = run(train(write_recipe(tmp_path, text), stop_after=5), tmp_path)
    assert stopped.status == 75
    folder = tmp_path / "runs/tiny"
    done = run(script(ROOT / "launch/train.py", "recipe.yaml"), folder)
    assert done.status == 0 and "step 12/12" in done.out and not (folder / "runs").exists(), done
    assert f"Saved in {folder}. Try it:\n  python -m llm.sample {folder} --prompt " in done.out


def test_a_run_is_read_from_anywhere_and_after_a_move(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    recipe = write_recipe(
        project, write_text(project / "text.txt"), **{"text.cache": "data", "text.files": "[text.txt]"}
    )
    assert run(train(recipe), project).status == 0
    (tmp_path / "elsewhere").mkdir()

    def read(folder: Path) -> None:
        for words in (("verify", folder), ("evaluate", folder), ("show", folder, "--step", "1")):
            done = run(script(f"module:llm.{words[0]}", *words[1:]), tmp_path / "elsewhere")
            assert done.status == 0, (words, done.out, done.err)

    read(project / "runs/tiny")
    project = project.rename(tmp_path / "moved")
    read(project / "runs/tiny")
    (project / "runs/tiny").rename(tmp_path / "alone")
    done = run(script("module:llm.evaluate", tmp_path / "alone"), tmp_path / "elsewhere")
    refused(done, 4, "data/shards", "prepare the text again")
    run_folder = tmp_path / "alone"
    known = atomic_io.read_checksummed(run_folder / "shards.json")
    atomic_io.write_checksummed(run_folder / "shards.json", {**known, "absolute": str(project / known["folder"])})
    read(run_folder)


def test_a_damaged_record_of_the_machine_says_what_to_remove(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "runs/tiny/machine.json"
    record.write_text("")
    refused(run(train(tmp_path / "recipe.yaml"), tmp_path), 4, "runs/tiny/machine.json", "remove it")
    record.unlink()
    assert run(train(tmp_path / "recipe.yaml"), tmp_path).status == 0


LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "--runs", LONG), ("prepare", "--wiki", LONG), ("prepare", LONG), ("plan", LONG), ("inspect", LONG), ("verify", LONG),
        ("plan", "--text", LONG, "--gpu", "3080ti", "--hours", "1"), ("sample", LONG, "--prompt", "a"), ("evaluate", LONG),
        ("show", LONG), ("report", LONG), ("chat", LONG), ("serve", LONG), ("export", LONG), ("export", "tiny", "--to", LONG),
        ("report", "tiny", "--out", LONG), ("evaluate", "tiny", "--text", LONG), ("sample", "tiny", "--file", LONG),
    ],
    ids=lambda words: " ".join(words).replace(LONG, "long"),
)  # fmt: skip
def test_a_name_that_is_too_long_is_refused_in_one_line(trained: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    there = sorted(tmp_path.rglob("*"))
    refused(run(script(f"module:llm.{words[0]}", *words[1:]), tmp_path), 2)
    assert [each for each in sorted(tmp_path.rglob("*")) if each.name not in ("out.txt", "err.txt")] == [
        each for each in there if each.name not in ("out.txt", "err.txt")
    ]
