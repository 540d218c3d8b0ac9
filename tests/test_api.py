"""The public API: from a folder that is not the checkout, twice in one process, after a stop, with parts of one's own."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import llm
from llm.base.errors import RecipeError, StoppedError
from llm.distributed.modes import usual_modes
from llm.distributed.sharding import LocalShard
from llm.model.transformer import Transformer
from llm.training.trainer import Trainer
from tests.examples.lion import Lion
from tests.forks import digest, run, train, write_recipe, write_text


def test_a_run_is_trained_opened_and_used_twice_in_one_process(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))

    def act() -> None:
        for name in ("first", "second"):
            trained = llm.train(llm.load_recipe(path, [f"run={name}"]), runs="kept")
            assert trained.folder == Path("kept") / name and trained.step == 12
        opened = llm.open_run("first", runs="kept")
        assert opened.generate("My self Har", tokens=8) == trained.generate("My self Har", tokens=8)
        score = opened.evaluate()
        last = [line for line in opened.metrics if "val_loss" in line][-1]
        assert score["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-4)
        assert json.dumps(opened.metrics) and not Path("runs").exists()
        for act, words in (
            (lambda: opened.generate("a", tokens=-1), "tokens = -1"),
            (lambda: opened.generate("a", temperature=-1), "temperature = -1"),
            (lambda: opened.generate("a", top_k=2.5), "top_k = '2.5'"),
            (lambda: opened.generate("a", seed=2**63), "seed = 9223372036854775808"),
            (lambda: opened.generate("\ud800"), "half of a surrogate pair"),
            (lambda: opened.evaluate(rows=0), "rows = 0"),
        ):
            with pytest.raises(RecipeError, match=words):
                act()

    done = run(act, tmp_path)
    assert done.status == 0, done.err


def test_a_run_that_was_stopped_goes_on_in_the_same_process(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    (tmp_path / "whole").mkdir()
    assert run(train(path), tmp_path / "whole").status == 0

    def act() -> None:
        recipe, update = llm.load_recipe(path), Trainer.update

        def interrupted(self, step):  # type: ignore[no-untyped-def]
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return update(self, step)

        Trainer.update = interrupted  # type: ignore[method-assign]
        with pytest.raises(StoppedError):
            llm.train(recipe)
        Trainer.update = update  # type: ignore[method-assign]
        assert llm.train(recipe).step == 12

    done = run(act, tmp_path)
    assert done.status == 0, done.err
    assert digest(tmp_path) == digest(tmp_path / "whole")


def test_packaged_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llm.load_recipe("quickstart", ["run=try"]).run == "try"
    with pytest.raises(RecipeError, match=r"no packaged recipe 'slowstart'.*quickstart"):
        llm.load_recipe("slowstart")
    for name in ("a" * 300, "a\0b", "\ud800"):
        with pytest.raises(RecipeError):
            llm.load_recipe(name)
    with pytest.raises(AttributeError):
        llm.nothing  # noqa: B018


class Tempered(Transformer):
    """With a scalar that is learnt."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, tokens: Any, targets: Any = None, *given: Any, **named: Any) -> Any:
        return super().forward(tokens, targets, *given, **named) * self.temperature


class Counting(Lion):
    """With state of other types than weights have."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.moments |= {"steps": LocalShard(torch.zeros(1, dtype=torch.int64), (1,), 0), "sum": LocalShard(torch.zeros(()), (), 0)}  # fmt: skip

    def step(self, *given: Any) -> None:
        super().step(*given)
        for name in ("steps", "sum"):
            self.moments[name].local.add_(given[-1])  # whether the gradient is finite


@pytest.mark.parametrize(
    "parts", [{"model": Tempered}, {"optimizer": Counting}, {"model": Tempered, "optimizer": Counting}]
)
def test_parts_with_scalars_and_counters_stop_and_resume_to_the_same_bits(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    def act() -> None:
        llm.train(llm.load_recipe(path, ["run=whole"]), **parts)
        with pytest.raises(StoppedError):
            llm.train(llm.load_recipe(path), on_log=stop, **parts)
        assert llm.train(llm.load_recipe(path), **parts).step == 12

    done = run(act, tmp_path)
    assert done.status == 0, done.err
    assert digest(tmp_path) == digest(tmp_path, "whole")


def frozen(model: Transformer) -> None:
    model.model.norm.weight.requires_grad_(False)


def unused(model: Transformer) -> None:
    model.extra = torch.nn.Parameter(torch.zeros(3))


def half(model: Transformer) -> None:
    model.model.norm.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (frozen, "does not require a gradient: make it a buffer"),
        (unused, "extra had no gradient in a trial step"),
        (half, r"norm\.weight is torch\.bfloat16: make it torch\.float32"),
    ],
)
def test_a_weight_that_cannot_be_trained_is_named(
    tmp_path: Path, change: Callable[[Transformer], None], said: str
) -> None:
    def changed(*given: Any) -> Transformer:
        model = Transformer(*given)
        change(model)
        return model

    recipe = llm.load_recipe(write_recipe(tmp_path, write_text(tmp_path / "text.txt")))

    def act() -> None:
        with pytest.raises(RecipeError, match=said):
            llm.train(recipe, model=changed)

    done = run(act, tmp_path)
    assert done.status == 0, done.err


@pytest.mark.parametrize("part", ["model", "optimizer", "documents", "on_log"])
def test_a_part_that_is_no_function_is_named(tmp_path: Path, part: str) -> None:
    recipe = llm.load_recipe(write_recipe(tmp_path, tmp_path / "text.txt"))
    with pytest.raises(RecipeError, match=f"{part}= is list, not a function"):
        llm.train(recipe, **{part: ["a"]})  # type: ignore[arg-type]


def test_a_working_folder_that_was_removed_is_one_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))

    def act() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        train(recipe)()

    done = run(act, tmp_path)
    assert done.status == 2 and done.err.count("\n") == 1 and "the working folder was removed" in done.err, done.err


def test_a_run_is_trained_in_a_thread(tmp_path: Path) -> None:
    recipe = llm.load_recipe(write_recipe(tmp_path, write_text(tmp_path / "text.txt")))

    def act() -> None:
        thread = threading.Thread(target=llm.train, args=(recipe,))
        thread.start()
        thread.join()

    done = run(act, tmp_path)
    assert done.status == 0 and digest(tmp_path).startswith("12:"), done.err


def test_a_callers_modes_of_torch_change_nothing(tmp_path: Path) -> None:
    """In bf16, too, where a cache of autocast that is never emptied would train with the first step's weights."""
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    cases = [("fp32", torch.no_grad, True), ("bf16", torch.inference_mode, True), ("bf16", torch.no_grad, False)]

    def act() -> None:
        for number, (precision, mode, casting) in enumerate(cases):
            alone, amid = (
                llm.load_recipe(path, [f"run={name}-{number}", f"machine.precision={precision}"])
                for name in ("alone", "amid")
            )
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            llm.train(alone)
            torch.set_default_dtype(torch.float64)
            torch.set_float32_matmul_precision("medium")
            autocast = torch.autocast("cpu", torch.float16, enabled=casting)
            with mode(), autocast, torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
                trained = llm.train(amid)
                score = trained.evaluate()
                assert trained.generate("My")
                assert torch.get_default_device().type == "meta" and not torch.backends.cuda.flash_sdp_enabled()
                assert torch.is_autocast_enabled("cpu") == casting and torch.is_autocast_cache_enabled()
                assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
                assert torch.get_float32_matmul_precision() == "medium"
            assert score == trained.evaluate() and next(trained.model.parameters()).dtype == torch.float32

    done = run(act, tmp_path)
    assert done.status == 0, done.err
    for number in range(len(cases)):
        assert digest(tmp_path, f"amid-{number}") == digest(tmp_path, f"alone-{number}")


def test_two_runs_do_not_train_in_one_process_at_once(tmp_path: Path) -> None:
    """Each would change modes, variables and Accelerate's state under the other."""
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))

    def act() -> None:
        refusals = []

        def meddle(line: dict[str, Any]) -> None:
            if line["step"] == 5 and not refusals:
                with pytest.raises(RecipeError, match="another run trains in this process") as refused:
                    llm.train(llm.load_recipe(path, ["run=other", "machine.precision=bf16"]))
                refusals.append(refused)

        def apart(line: dict[str, Any]) -> None:
            if line["step"] == 5 and not children:
                child = multiprocessing.get_context("fork").Process(
                    target=llm.train, args=(llm.load_recipe(path, ["run=apart"]),)
                )
                child.start()
                child.join()
                children.append(child.exitcode)

        children: list[int | None] = []
        before = dict(os.environ)
        llm.train(llm.load_recipe(path, ["run=parent"]), on_log=apart)
        assert children == [0]  # as the refusal advises
        assert llm.train(llm.load_recipe(path), on_log=meddle).step == 12 and refusals
        assert os.environ == before
        assert llm.train(llm.load_recipe(path, ["run=other"])).step == 12

    done = run(act, tmp_path)
    assert done.status == 0 and len({digest(tmp_path, name) for name in ("tiny", "other", "apart")}) == 1, done.err


def test_what_is_set_for_all_of_torch_reaches_its_products_after_a_run(tmp_path: Path) -> None:
    product = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def act() -> None:
        for general, own, later in (("tf32", "none", "ieee"), ("ieee", "bf16", "bf16")):
            torch.backends.fp32_precision, product.fp32_precision = general, own  # type: ignore[attr-defined]
            with usual_modes():
                assert product.fp32_precision == "ieee"
            assert product.fp32_precision == (general if own == "none" else own)
            torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
            assert product.fp32_precision == later

    assert run(act, tmp_path).status == 0


def test_a_run_is_used_after_its_caller_went_to_another_folder(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))

    def act() -> None:
        trained = llm.train(llm.load_recipe(path))
        score, lines = trained.evaluate(), trained.metrics
        Path("below").mkdir()
        os.chdir("below")
        assert trained.evaluate() == score and trained.metrics == lines
        assert trained.evaluate(tmp_path / "text.txt")["targets"] > 1000

    done = run(act, tmp_path)
    assert done.status == 0, done.err


def test_a_watcher_changes_nothing_that_is_recorded(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    write_text(tmp_path / "other.txt", documents=40)
    sources = [f"text.sources.{name}.{key}" for name in ("text", "other") for key in (f"files={name}.txt", "weight=1")]

    def spoil(line: dict[str, Any]) -> None:
        for each in line.get("sources", {}).values():
            each.clear()
        line.clear()

    def act() -> None:
        llm.train(llm.load_recipe(path, sources), on_log=spoil)

    done = run(act, tmp_path)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    measured = [line["sources"] for line in lines if "sources" in line]
    assert measured and all("bits_per_byte" in each for found in measured for each in found.values())
