"""A loss or a gradient that is not finite touches nothing, on any process; what happens then is the recipe's to say."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llm.distributed.coordinator
from llm.base.errors import DivergedError
from llm.config.reading import load
from llm.data.batches import Batch, BatchLoader
from llm.data.shuffle import WindowShuffle
from llm.interop.pretrained import ready
from llm.run_folder import checkpoint
from llm.run_folder.trace import read
from llm.training.context import TrainState
from llm.training.monitor import Monitor
from llm.training.step import FP16_GROWTH_STEPS, FP16_MOST, FP16_SCALE, GradientStep, rescale
from tests.forks import ROOT, digest, run, run_group, script, train, write_recipe, write_text

BAD = 5  # the update whose numbers are spoilt: its batch has this number less one


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def spoilt(recipe: Path, where: str, rank: int = 0) -> Callable[[], None]:
    """The launch script with a loss, or one number of one gradient, of process `rank` spoilt in update BAD."""
    launch = script(ROOT / "launch" / "train.py", recipe)

    def child() -> None:
        accumulate = GradientStep.accumulate

        def spoiling(self: GradientStep, batches: list[Batch]) -> Tensor:
            bad = self.state.step + 1 == BAD
            if bad and where == "loss" and llm.distributed.process.rank() == rank:
                model = self.state.model
                forward = model.forward
                model.forward = lambda *batch: forward(*batch) * float("inf")  # type: ignore[method-assign]
                result = accumulate(self, batches)
                model.forward = forward  # type: ignore[method-assign]
                return result
            result = accumulate(self, batches)
            if bad and where == "gradient":
                self._gradients()[3].local.view(-1)[0] = float("nan")
            return result

        GradientStep.accumulate = spoiling  # type: ignore[method-assign]
        launch()

    return child


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_under_stop_the_run_ends_with_status_3_and_the_weights_before_it(
    tmp_path: Path, text: Path, where: str, optimizer: str
) -> None:
    changes = {"train.optimizer": optimizer, "checkpoint.every": 4, "tracking.every": 12, "evaluate.every": 12}
    recipe = write_recipe(tmp_path, text, **changes)
    ended = run(spoilt(recipe, where), tmp_path)
    assert ended.status == 3 and f"step {BAD} was not finite" in ended.err and len(ended.err.splitlines()) == 1
    newest = checkpoint.newest(tmp_path / "runs/tiny", print)
    assert newest is not None and newest.step == 4
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    event = next(line for line in lines if "event" in line)
    assert event["step"] == BAD and all(event["texts"])
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == 3
    # Undisturbed, the same command goes on from there to the end of a run that was never disturbed.
    assert run(train(recipe), tmp_path).status == 0
    (tmp_path / "whole").mkdir()
    assert run(train(recipe), tmp_path / "whole").status == 0
    assert digest(tmp_path) == digest(tmp_path / "whole")


def test_the_texts_of_any_bad_step_can_be_named(tmp_path: Path, text: Path) -> None:
    """Also of one that read the last window of the text."""
    recipe, tokenizer, shards = ready(load(write_recipe(tmp_path, text)), lambda line: None)
    order = WindowShuffle(recipe.seed, shards.train.tokens, recipe.model.context)
    loader = BatchLoader(shards.train, order, recipe.windows_per_step, 1)
    context = SimpleNamespace(
        recipe=recipe, tokenizer=tokenizer, shards=shards, order=order, loader=lambda size: loader
    )
    monitor = SimpleNamespace(context=context)
    steps = range(1, order.windows // recipe.windows_per_step + 2)
    texts = [Monitor._texts(monitor, step) for step in steps]  # type: ignore[arg-type]
    last = int(np.argmax(order.starts(np.arange(order.windows))))
    assert {len(each) for each in texts} == {recipe.windows_per_step}
    assert tokenizer.decode(order.ids(shards.train, last).tolist()) in [each for some in texts for each in some]


def test_the_advice_of_a_diverged_run_leaves_out_the_very_batch(tmp_path: Path, text: Path) -> None:
    """Step 2 was left out already, so that step 5 reads what would be step 6's."""
    recipe = write_recipe(tmp_path, text, **{"checkpoint.every": 4, "evaluate.every": 12, "train.skip": "[2]"})
    ended = run(spoilt(recipe, "loss"), tmp_path)
    advice = shlex.split(ended.err.splitlines()[-1].rpartition("run=NAME")[2])
    assert ended.status == 3 and advice == ["from=tiny/step-000004", "train.skip=[2,6]"]
    assert run(train(recipe, "run=rewound", *advice), tmp_path).status == 0
    assert run(train(recipe, "run=whole", "train.skip=[]"), tmp_path).status == 0
    of_step = [
        {line["step"]: line["windows"] for line in read(tmp_path / "runs" / each)} for each in ("rewound", "whole")
    ]
    assert [of_step[0][step] for step in range(BAD, 9)] == [of_step[1][step + 2] for step in range(BAD, 9)]


@pytest.mark.parametrize("world", [1, 2])
def test_under_skip_the_update_is_left_out_with_a_record_on_every_process_alike(
    tmp_path: Path, text: Path, world: int
) -> None:
    """A loss that only the last process spoils; the others must leave the update out as well."""
    recipe = write_recipe(tmp_path, text, **{"train.on_nonfinite": "skip", "checkpoint.every": 1, "evaluate.every": 12})
    for ended in run_group(spoilt(recipe, "loss", rank=world - 1), tmp_path, world):
        assert ended.status == 0, ended.err
    folder = tmp_path / "runs/tiny"
    before, after = (checkpoint.open_checkpoint(checkpoint.folder_of(folder, step)) for step in (BAD - 1, BAD))
    assert before.digest == after.digest  # not one bit of weights or moments
    assert checkpoint.open_checkpoint(checkpoint.folder_of(folder, BAD + 1)).digest != after.digest
    events = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "event" in line]
    assert [event["step"] for event in events] == [BAD]
    written = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in written and "Infinity" not in written, "no JSON"
    assert run_group(train(recipe, "checkpoint.every=2"), tmp_path, world)[0].status == 0, "what was null is read again"


def scaled(scale: float, good_steps: float = 0.0, step: int = 0) -> TrainState:
    """A state of which only the scale and the step are looked at."""
    return TrainState(Any, Any, torch.tensor(scale), torch.tensor(good_steps), step)  # type: ignore[arg-type]


def test_fp16s_scale_halves_after_an_overflow_and_doubles_after_many_sound_steps() -> None:
    state, finite = scaled(1024.0), torch.tensor(True)
    rescale(state, ~finite)
    assert state.scale == 512 and state.good_steps == 0
    for _ in range(FP16_GROWTH_STEPS):
        rescale(state, finite)
    assert state.scale == 1024 and state.good_steps == 0
    stored = json.loads(json.dumps([state.scale.item(), state.good_steps.item()]))
    assert stored == [1024.0, 0.0]


def test_an_fp16_gradient_that_is_finite_at_no_scale_ends_the_run_as_diverged() -> None:
    state, finite = scaled(FP16_SCALE, step=20), torch.tensor(True)
    context, gradient_step = SimpleNamespace(folder=Path("runs/tiny")), SimpleNamespace(finite_flags=[])
    monitor = Monitor(context, state, gradient_step, None)  # type: ignore[arg-type]
    for _ in range(16):
        rescale(state, ~finite)
        monitor.check(-1)
    assert state.scale == 1
    rescale(state, ~finite)
    with pytest.raises(DivergedError, match=r"step 20 is not finite in fp16.*machine\.precision=bf16"):
        monitor.check(-1)
    state = scaled(FP16_MOST, FP16_GROWTH_STEPS - 1.0)
    rescale(state, finite)
    assert state.scale == FP16_MOST, "a gradient of nothing but zeros lets it not grow without end"


def test_a_spike_is_recorded_with_its_step(tmp_path: Path, text: Path) -> None:
    from llm.config.reading import load
    from llm.run_folder.metrics import SPIKE_WINDOW, Tracker

    tracker = Tracker(tmp_path, load(write_recipe(tmp_path, text)), 0, {})
    quiet = {"learning_rate": 0.0, "gradient_norm": 0.0, "tokens_per_second": 1.0, "epoch": 0.0, "seconds_left": 0.0}
    for step in range(1, SPIKE_WINDOW):
        tracker.log(step, loss=3.0 + 0.01 * (step % 3), **quiet)
    tracker.log(SPIKE_WINDOW, loss=3.5, **quiet)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "spike" in line.get("event", "")] == [SPIKE_WINDOW]
