"""machine.compile: auto is decided before the first step, the same for all ranks, and kept for the life of a run."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm.base import atomic_io
from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.config.schema import Recipe
from llm.insight.planning import sized
from llm.training import compiling
from llm.training.micro_batch import MicroBatches
from tests.forks import ROOT, Ended, digest, run, run_group, train, write_recipe, write_text

COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=20)


def pays(recipe: Recipe, device: str, number: int, workers: int) -> bool:
    return compiling.pays(recipe, sized(recipe).tokenizer.vocab_size, device=device, number=number, workers=workers)


@pytest.mark.parametrize("name", ["quickstart", "classic", "small", "medium", "large"])
def test_a_run_of_an_hour_is_compiled_and_quickstart_is_not(name: str) -> None:
    recipe = with_steps(load(ROOT / f"recipes/{name}.yaml"), 1_400_000)
    hour = replace(recipe, train=replace(recipe.train, steps=0, hours=1.0))
    for device, number, workers in [("cpu", 4, 1), ("cpu", 2, 2), ("cpu", 4, 64), ("cuda", 2, 1), ("cuda", 4, 8)]:
        assert pays(hour, device, number, workers)
        assert name != "quickstart" or not pays(recipe, device, number, workers)
        lengths = [
            replace(hour, train=replace(hour.train, hours=0.0, steps=10**n, tokens_per_step=64)) for n in range(9)
        ]
        found = [pays(each, device, number, workers) for each in lengths]
        assert found == sorted(found) and found[0] < found[-1]  # from some length on
    assert not pays(hour, "mps", 4, 1)


def act(recipe: Path, *, pays: bool, works: bool = True, stop_after: int | None = None) -> Callable[[], None]:
    """Training under `auto` in which compiling would pay or not; it compiles nothing, but says so."""

    def done() -> None:
        def compiled(self: MicroBatches) -> None:
            self.compiled = True
            print("compiled")

        compiling.pays = lambda *given, **named: pays  # type: ignore[assignment]
        compiling.works = lambda device: works or os.environ.get("RANK", "0") == "0"
        MicroBatches._compile = compiled  # type: ignore[method-assign]
        train(recipe, "machine.compile=auto", stop_after=stop_after)()

    return done


def recorded(folder: Path) -> bool:
    kept = json.loads((folder / "runs/tiny/machine.json").read_text())["compile"]
    (manifest,) = (folder / "runs/tiny/checkpoints").glob("*/checkpoint.json")
    assert json.loads(manifest.read_text())["machine"]["machine.compile"] is kept
    assert isinstance(kept, bool)
    return kept


def stopped(ended: Ended) -> bool:
    """Whether that run, stopped on request, was compiled."""
    assert ended.status == 75, ended.err
    return "compiled" in ended.out


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_keeps_what_it_had(tmp_path: Path, text: Path, first: bool) -> None:
    recipe = write_recipe(tmp_path, text, **{"checkpoint.keep": 1, "evaluate.every": 99})
    assert stopped(run(act(recipe, pays=first, stop_after=2), tmp_path)) is first
    assert recorded(tmp_path) is first
    assert stopped(run(act(recipe, pays=not first, stop_after=4), tmp_path)) is first
    assert recorded(tmp_path) is first


def test_a_run_from_before_stays_uncompiled(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"checkpoint.keep": 1, "evaluate.every": 99})
    assert not stopped(run(act(recipe, pays=False, stop_after=2), tmp_path))
    path = tmp_path / "runs/tiny/machine.json"
    old = {name: value for name, value in atomic_io.read_checksummed(path).items() if name != "compile"}
    atomic_io.write_checksummed(path, old)
    assert not stopped(run(act(recipe, pays=True, stop_after=4), tmp_path))
    assert recorded(tmp_path) is False


@pytest.mark.parametrize("works", [True, False])
def test_two_processes_agree(tmp_path: Path, text: Path, works: bool) -> None:
    """Where the second one has no compiler, neither compiles."""
    recipe = write_recipe(tmp_path, text, **{"checkpoint.keep": 1, "evaluate.every": 99})
    both = run_group(act(recipe, pays=True, works=works), tmp_path, 2)
    assert [each.status for each in both] == [0, 0], both[1].err
    assert ["compiled" in each.out for each in both] == [works, works]
    assert ("no compiler works here" in both[0].out) is not works


def test_without_a_compiler_it_goes_on_without(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"checkpoint.keep": 1, "evaluate.every": 99})

    def missing() -> None:
        import torch._inductor.config

        compiling.pays = lambda *given, **named: True  # type: ignore[assignment]
        torch._inductor.config.cpp.cxx = (None, "/no/compiler")
        train(recipe, "machine.compile=auto", stop_after=2)()

    ended = run(missing, tmp_path)
    assert not stopped(ended) and "no compiler works here" in ended.out and recorded(tmp_path) is False


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_a_compiled_run_resumes_and_splits_to_the_same_bits(tmp_path: Path, text: Path) -> None:
    """Stopped and resumed, and with machine.exact on 1 and 2 processes; dropout on."""
    recipe = write_recipe(tmp_path, text, **{
        "train.tokens_per_step": 256, "machine.exact": "true", "machine.micro_batch": "auto"})  # fmt: skip

    def compiled(stop_after: int | None = None) -> Callable[[], None]:
        def done() -> None:
            compiling.pays = lambda *given, **named: True  # type: ignore[assignment]
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")
            train(recipe, stop_after=stop_after)()

        return done

    for name, world, stop_after in [("one", 1, None), ("two", 2, None), ("stopped", 1, 3), ("stopped", 1, None)]:
        (tmp_path / name).mkdir(exist_ok=True)
        for each in run_group(compiled(stop_after), tmp_path / name, world, seconds=600):
            assert each.status == (75 if stop_after else 0), each.err
    assert len({digest(tmp_path / name) for name in ("one", "two", "stopped")}) == 1
    assert "the blocks were compiled in" in (tmp_path / "one/out.txt").read_text()
