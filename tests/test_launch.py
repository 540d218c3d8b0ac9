"""The main command: what it leaves, what it says, and one clear line with the right status for whatever is wrong."""

import gc
import json
import os
import shutil
import signal
import warnings
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import is_initialized
from safetensors import safe_open

from llm import checkpoint, session, store
from llm.errors import StoppedError
from llm.prepare import ready
from llm.recipe import load
from llm.trainer import Trainer
from tests.forks import Ended, digest, ended, run, script, start, train, write_recipe, write_text


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


def test_a_run_says_what_is_coming_and_how_to_sample_it(trained: Path) -> None:
    said = (trained / "said.txt").read_text()
    before, _, after = said.partition("step  1/12")
    assert all(word in before for word in ("parameters", "12 steps", "epochs", "about"))
    assert "My self Har|" in after and "bits per byte" in after
    assert after.rstrip().endswith('python -m llm.sample tiny --prompt "My self Har"')


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


def test_another_science_half_is_refused_with_the_first_key_and_both_ways_on(trained: Path) -> None:
    ended = run(train(trained / "recipe.yaml", "train.learning_rate=0.01", "model.dropout=0"), trained)
    refused(ended, 4, "model.dropout = 0.1", "run=NAME", "from=tiny/step-000012")


def test_another_machine_half_is_taken(trained: Path) -> None:
    ended = run(
        train(trained / "recipe.yaml", "machine.micro_batch=4", "tracking.every=3", "evaluate.every=2"), trained
    )
    assert ended.status == 0, ended.err


def test_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    assert run(train(recipe, stop_after=3), tmp_path).status == 75
    write_text(tmp_path / "text.txt", documents=61)
    refused(run(train(recipe), tmp_path), 4, "tiny", "another tokenizer")


def test_from_takes_weights_moments_and_step_along(trained: Path) -> None:
    ended = run(train(trained / "recipe.yaml", "run=longer", "from=tiny/step-000012", "train.steps=15"), trained)
    assert ended.status == 0 and "from step 12" in ended.out, ended.err
    newest = checkpoint.newest(trained / "runs/longer", print)
    assert newest is not None and newest.step == 15 and newest.manifest["parent"]["from"] == "tiny/step-000012"


def test_a_second_run_in_the_same_folder_is_refused(trained: Path) -> None:
    with store.lock(trained / "runs/tiny/lock") as mine:
        assert mine
        refused(run(train(trained / "recipe.yaml"), trained), 4, "tiny", "held")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ("train.stepz", "did you mean train.steps?")),
        ("train.steps=many", ("train.steps", "'many'", "whole number")),
        ("text.files=nowhere.txt", ("nowhere.txt", "is not there", "python -m llm.prepare --wiki")),
        ("text.files=empty.txt", ("empty.txt",)),
        ("text.files=short.txt", ("short.txt", "text.documents=blocks", "text.validation=0")),
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


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("compiler", [pytest.param("there", marks=pytest.mark.slow), "missing"])
def test_compiled_blocks_are_said_with_their_cost_or_done_without(
    tmp_path: Path, text: Path, compiler: str, recompute: str
) -> None:
    if compiler == "there" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    recipe = write_recipe(tmp_path, text, **{
        "machine.compile": "true", "machine.recompute": recompute, "train.steps": 3, "train.warmup": 0})  # fmt: skip

    def act() -> None:
        kept, first = [], Trainer._pass

        def keeping(self: Trainer, micro_batch: int) -> None:
            try:
                first(self, micro_batch)
            except Exception as error:
                kept.append(error)  # as a compiler's own threads may: what its frames hold must not live on with it
                raise

        Trainer._pass = keeping  # type: ignore[method-assign]
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

        def kept(self: Trainer, *given: Any) -> None:
            init(self, *given)
            models.append(weakref.ref(self.model))

        Trainer.__init__ = kept  # type: ignore[method-assign]
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor"
        import_module("llm.corpus").lean_datasets()
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


def test_a_run_is_read_from_anywhere_and_after_a_move(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    recipe = write_recipe(
        project, write_text(project / "text.txt"), **{"text.cache": "data", "text.files": "[text.txt]"}
    )
    assert run(train(recipe), project).status == 0
    (tmp_path / "elsewhere").mkdir()

    def read(folder: Path) -> None:
        for words in (("verify", folder), ("evaluate", folder), ("show", folder, "--step", "0")):
            done = run(script(f"module:llm.{words[0]}", *words[1:]), tmp_path / "elsewhere")
            assert done.status == 0, (words, done.out, done.err)

    read(project / "runs/tiny")
    project = project.rename(tmp_path / "moved")
    read(project / "runs/tiny")
    (project / "runs/tiny").rename(tmp_path / "alone")
    done = run(script("module:llm.evaluate", tmp_path / "alone"), tmp_path / "elsewhere")
    refused(done, 4, "data/shards", "prepare the text again")
    run_folder = tmp_path / "alone"
    known = store.read_sealed(run_folder / "shards.json")
    store.write_sealed(run_folder / "shards.json", {**known, "absolute": str(project / known["folder"])})
    read(run_folder)


def test_a_damaged_record_of_the_machine_says_what_to_remove(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "runs/tiny/machine.json"
    record.write_text("")
    refused(run(train(tmp_path / "recipe.yaml"), tmp_path), 4, "runs/tiny/machine.json", "remove it")
    record.unlink()
    assert run(train(tmp_path / "recipe.yaml"), tmp_path).status == 0
