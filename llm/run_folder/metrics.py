"""Logging of a run: the console, metrics.jsonl, and W&B or TensorBoard through accelerate's trackers.

metrics.jsonl is the record: one object a line, with steps that only rise, across stops too. The trackers are copies for
people to look at, and none of them can end the run.
"""

import importlib
import math
import os
import statistics
import struct
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from llm.base import atomic_io
from llm.base.durations import readable
from llm.base.errors import RefusedError, harmless, tell
from llm.config.schema import Recipe, flat
from llm.distributed.process import warn
from llm.run_folder import panel
from llm.run_folder.panel import Panel
from llm.run_folder.record import METRICS, MOST

EVALUATION = {"val_loss", "sample"}  # one of these is in each line of an evaluation
SCORES = ("val_loss", "bits_per_byte", "epochs_seen")  # of an evaluation
NUMBERS = ("loss", *SCORES, "bytes_per_token", "seconds")  # that a run which goes on reads
SPIKE_SIGMAS, SPIKE_WINDOW = 6, 64  # a loss this far above this many before it is a spike
RECENT = 0.1  # of the steps so far: their losses (at most SPIKE_WINDOW) are the training loss beside an evaluation
WANDB_SECONDS = 20  # to reach W&B before the run goes on without it


def _is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a number of the record is finite: others are null, or NaN where an earlier version wrote the line."""
    return value is not None and math.isfinite(value)


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line of the record has what a run goes on from, of its type; a damaged one does not."""
    texts = [line.get(name) for name in ("prompt", "sample")] if "sample" in line else []
    numbers = [line[name] for name in NUMBERS if line.get(name) is not None]  # null: not finite
    plain = all(type(each) is float or (type(each) is int and abs(each) < MOST) for each in numbers)
    scored = line.get("val_loss") is None or line.get("bits_per_byte") is not None
    return type(line.get("step")) is int and plain and scored and all(isinstance(each, str) for each in texts)


class Tracker:
    """Logs for the main process of a run that continues after `step`; later lines of the record are removed.

    With `again`, the evaluation of `step` itself is removed too, as it will be repeated. `on_log` gets a copy of each
    line as it is recorded.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        step: int,
        shown: dict[str, Any],
        again: bool = False,
        on_log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        steps, lines, damaged = [0], list[dict[str, Any]](), 0  # steps of all lines, and those that are kept

        def keep(line: dict[str, Any]) -> bool:
            nonlocal damaged
            if not _is_whole(line):
                damaged += 1
                return False
            steps.append(line["step"])
            if line["step"] > step:
                return False
            if line["step"] == step and again and EVALUATION & line.keys():
                return False
            lines.append(line)
            return True

        path = run / METRICS
        self.record, self.on_log = atomic_io.Lines(path, keep=keep), on_log
        if damaged := damaged + self.record.invalid:
            warn(f"{path} was damaged: {damaged} of its lines are left out")
        # Steps that a killed run logged after its checkpoint are repeated with the same values, so trackers get values
        # from this step on only. W&B may have lost its last ones; `_start_wandb` asks it.
        self.told = dict.fromkeys(("tensorboard", "wandb"), max(steps))
        self.steps = recipe.train.steps
        self.panel = Panel(recipe.run, lines, recipe.from_step) if panel.has_room() else None
        # Seconds of training before this start and the clock of this one; evaluations and checkpoints count.
        self.before = max((s for line in lines if _is_finite(s := line.get("seconds"))), default=0.0)
        self.began = time.monotonic()
        self.trackers: dict[str, Any] = {}
        self.texts = [[line["step"], line["prompt"], line["sample"]] for line in lines if "sample" in line]
        self.losses: deque[tuple[int, float]] = deque(maxlen=SPIKE_WINDOW)  # step and loss of the last, where finite
        for line in lines:
            self._remember(line.get("step", 0), line.get("loss"))
        self.first = recipe.from_step  # an evaluation at this step is of the weights that the run begins with
        finite = (line for line in lines if all(_is_finite(line.get(name)) for name in SCORES))
        self.evaluations = [line for line in finite if line["step"] > self.first]
        config = {**flat(recipe), **shown}
        if recipe.tracking.tensorboard:
            self._guard("tensorboard", lambda: self._start_tensorboard(run, config))
        if recipe.tracking.wandb != "off":
            self._guard("wandb", lambda: self._start_wandb(run, recipe, config, lines))

    def plan(self, steps: int) -> None:
        """Set the number of steps of the whole run."""
        self.steps = steps

    def begin(self, step: int, seconds_left: float, **facts: Any) -> None:
        """Record a start of the run after `step`: the steps and seconds that it is planned to take in all, and `facts`.

        The report holds the first such line against what came of it.
        """
        seconds = self.before + seconds_left
        self._append({"step": step, "planned_steps": self.steps, "planned_seconds": seconds, **facts})

    def say(self, text: str) -> None:
        """Print a line, above the panel if there is one."""
        self._on_panel(lambda shown: shown.say(harmless(text)))
        if self.panel is None:
            tell(text, sys.stdout)

    def _on_panel(self, act: Callable[[Panel], None]) -> None:
        """Act on the panel, if there is one. One whose terminal is gone is left; plain lines take its place."""
        if self.panel is not None:
            try:
                act(self.panel)
            except Exception:  # or a damaged line of the record, which no number can be drawn of
                shown, self.panel = self.panel, None
                with suppress(Exception):
                    shown.close()

    def log(self, step: int, **values: Any) -> None:
        """Record `values` of `step`. Reads tensors, so this waits for the device."""
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        if "loss" in numbers:
            numbers["seconds"] = self.before + time.monotonic() - self.began
        recent = [loss for at, loss in self.losses if at > step * (1 - RECENT)]
        if "val_loss" in numbers and recent:
            numbers["train_loss"] = statistics.fmean(recent)
        self._append({"step": step, **numbers})
        if "loss" in numbers:
            self._look_for_spike(step, numbers["loss"])
        if "val_loss" in numbers:
            if step > self.first:
                self.evaluations.append({"step": step, **numbers})
            best = min(self.evaluations, key=lambda each: each["bits_per_byte"], default=None)
            place = f"best: {best['bits_per_byte']:.4f} at step {best['step']}" if best else "before its first step"
            place = "best so far" if numbers.get("best") else place
            trained = f" (training {numbers['train_loss']:.4f})" if "train_loss" in numbers else ""
            also = f", {numbers['also_bits_per_byte']:.4f} of evaluate.also" if "also_bits_per_byte" in numbers else ""
            each = numbers.get("sources", {}).items()
            also += "".join(
                f"\n  {name}: {its['bits_per_byte']:.4f} bits per byte, {its['epochs']:.2f} epochs"
                for name, its in each
            )
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  validation: loss {numbers['val_loss']:.4f}"
                f"{trained}, {numbers['bits_per_byte']:.4f} bits per byte{also}\n"
                f"  {numbers['epochs_seen']:.2f} epochs seen  ({place})"
            )
        elif self.panel is None:
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {numbers['loss']:.4f}  "
                f"gradient {numbers['gradient_norm']:.2f}  {numbers['tokens_per_second']:,.0f} tokens/s  "
                f"{readable(numbers['seconds_left'])} left"
            )
        for name in [name for name in self.trackers if step >= self.told[name]]:
            self._guard(name, partial(self._tell, name, {"step": step, **numbers}))

    def _append(self, line: dict[str, Any]) -> None:
        self.record.append(line)
        if self.panel is not None:
            self.panel.take(line)
            self._on_panel(lambda shown: shown.draw(self.steps))
        if self.on_log is not None:
            self._guard("on_log", partial(self.on_log, deepcopy(line)))

    def _tell(self, name: str, line: dict[str, Any]) -> None:
        below = {f"{name}/{key}": its[key] for name, its in line.get("sources", {}).items() for key in its}
        plain = {name: value for name, value in (line | below).items() if isinstance(value, int | float)}
        self.trackers[name].log(plain, step=line["step"])

    def _look_for_spike(self, step: int, loss: float) -> None:
        losses = [each for _, each in self.losses]
        if len(losses) >= SPIKE_WINDOW // 2:
            spread = statistics.pstdev(losses)
            above = loss - statistics.fmean(losses)
            if above > SPIKE_SIGMAS * spread > 0:
                self.event(step, f"spike: loss {loss:.4f} is {above / spread:.1f} sigma above the last {len(losses)}")
        self._remember(step, loss)

    def _remember(self, step: int, loss: float | None) -> None:
        if _is_finite(loss):
            self.losses.append((step, loss))

    def event(self, step: int, event: str, **details: Any) -> None:
        """Record an unusual event."""
        self._append({"step": step, "event": event, **details})
        self.say(f"step {step}: {event}" + "".join(f"\n  | {text!r}" for text in details.get("texts", [])))

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Record the model's continuation of each of the recipe's prompts."""
        if not self.evaluations:  # otherwise they follow an evaluation's line
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  samples:")
        for prompt, text in texts:
            self._append({"step": step, "prompt": prompt, "sample": text})
            self.texts.append([step, prompt, text])
            self.say(f"  {prompt}|{text.replace(chr(10), chr(10) + '  ')}")
        if "wandb" in self.trackers:
            log = self.trackers["wandb"].log_table
            self._guard("wandb", partial(log, "samples", columns=["step", "prompt", "text"], data=self.texts))

    def flush(self) -> None:
        """Flush the record to the disk before a checkpoint relies on it."""
        self.record.flush()

    def close(self) -> None:
        self._on_panel(lambda shown: shown.draw(self.steps, now=True))
        self._on_panel(lambda shown: shown.close())
        self.panel = None
        self.record.close()
        for name, tracker in list(self.trackers.items()):
            self._guard(name, tracker.finish)

    def _guard(self, name: str, act: Callable[[], Any]) -> None:
        """Run `act`; a tracker that fails is reported once and dropped, as it is only a copy of the record."""
        try:
            act()
        except Exception as error:  # trackers raise anything, and no number depends on them
            self.trackers.pop(name, None)
            self.on_log = None if name == "on_log" else self.on_log
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            self.say(f"{name} is left out from here on ({reason}); metrics.jsonl goes on")

    def _start_tensorboard(self, run: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker("tensorboard", logging_dir=run)
        tracker.start()
        plain = {name: each if isinstance(each, int | float | str) else str(each) for name, each in config.items()}
        tracker.store_init_configuration(plain)
        self.trackers["tensorboard"] = tracker

    def _start_wandb(self, run: Path, recipe: Recipe, config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Start W&B. Of its variables, WANDB_MODE can only restrict the recipe's mode; PROJECT and NAME apply."""
        import wandb
        from accelerate.tracking import WandBTracker

        wanted = os.environ.get("WANDB_MODE", "").lower()
        if wanted == "disabled":
            return
        id, name = _wandb_id(run), os.environ.get("WANDB_NAME") or recipe.run
        project = os.environ.get("WANDB_PROJECT") or "onetext-llm"
        for kind in ("CACHE", "DATA"):  # otherwise it writes to the home folder
            os.environ.setdefault(f"WANDB_{kind}_DIR", str((run / "wandb").resolve()))
        if os.path.expanduser("~") == "~":  # noqa: PTH111  # no home folder, which W&B would look for
            os.environ["HOME"] = str((run / "wandb").resolve())
        quiet = wandb.Settings(init_timeout=WANDB_SECONDS, silent=True, console="off")
        wandb.setup(settings=quiet)
        mode = "offline" if wanted in ("offline", "dryrun") else recipe.tracking.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False)):
            self.say("wandb has no key (`wandb login` stores one): the run is kept offline; `wandb sync` sends it on")
            mode = "offline"

        def start(mode: str) -> None:
            options = {"resume": "allow", "config": config, "dir": str(run), "settings": quiet}
            tracker = WandBTracker(project, name=name, id=id, mode=mode, **options)
            tracker.start()
            # Plot over our steps: W&B's own step counts do not survive a sync of several starts.
            tracker.run.define_metric("step")
            tracker.run.define_metric("*", step_metric="step")
            self.trackers["wandb"] = tracker
            # A killed process loses lines that were neither uploaded nor written: send them again from the record.
            self.told["wandb"] = 1 + (_kept_offline(run) if mode == "offline" else tracker.run.step - 1)
            for line in lines:
                if line["step"] >= self.told["wandb"] and line.keys() & {"loss", "val_loss"}:
                    self._tell("wandb", line)

        try:
            start(mode)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            self.say(f"wandb cannot be reached ({' '.join(str(error).split())[:120]}): the run is kept offline")
            wandb.teardown()  # the failed attempt still holds the id
            start("offline")


def _wandb_id(run: Path) -> str:
    """W&B's id of this run; if wandb.json is damaged, that of the last folder that W&B made."""
    path = run / "wandb.json"
    with suppress(OSError, RefusedError, LookupError, TypeError):
        return str(atomic_io.read_json(path)["id"])
    made = sorted(folder.name.split("run-")[1] for folder in (run / "wandb").glob("*run-*-*"))
    id = made[-1].rpartition("-")[2] if made else uuid.uuid4().hex[:8]
    atomic_io.write_json(path, {"id": id})
    return id


def _kept_offline(run: Path) -> int:
    """The last step in W&B's own files of a run, or 0. A killed process leaves them unfinished."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the protobuf version it was generated with
        messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    last = 0
    for path in (run / "wandb").glob("*run-*/*.wandb"):
        for data in _records(path.read_bytes()):
            for item in messages.Record.FromString(data).history.item:
                if "step" in (item.key, *item.nested_key):
                    last = max(last, int(float(item.value_json)))
    return last


def _records(data: bytes) -> Iterator[bytes]:
    """The complete records of a log in LevelDB's format: a head of 7 bytes, then blocks of 32 KiB with their parts."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # after a checksum
        at += 7 + length
        if at > len(data) or kind not in (1, 2, 3, 4):  # incomplete: its writer was killed
            return
        parts = data[at - length : at] if kind in (1, 2) else parts + data[at - length : at]
        if kind in (1, 4):  # a full record, or its last part
            yield parts
