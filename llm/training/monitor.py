"""Metrics, trace and events of a run, and detection of losses and gradients that are not finite."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.base.errors import DivergedError
from llm.base.hashing import mix
from llm.distributed import process
from llm.run_folder import trace
from llm.run_folder.metrics import Tracker
from llm.training.context import RunContext, TrainState
from llm.training.length import Length
from llm.training.memory import peak_memory
from llm.training.step import FP16_LEAST, GradientStep


class Monitor:
    """Metrics, trace and events, which the main rank writes. All ranks call `check` and `record`: both communicate."""

    def __init__(self, context: RunContext, state: TrainState, gradient_step: GradientStep, length: Length) -> None:
        self.context, self.state, self.gradient_step, self.length = context, state, gradient_step, length
        self.tracker: Tracker | None = None
        self.trace: trace.Trace | None = None

    def open(self, *, evaluate_again: bool, step_seconds: float) -> None:
        """Go on from this step in the files of the run.

        `evaluate_again`: the step's evaluation will be done again. `step_seconds`: of a step, as rehearsed.
        """
        if process.rank() == 0:
            folder, step, on_log = self.context.folder, self.state.step, self.context.parts.on_log
            shown = {"world": process.world()}
            self.tracker = Tracker(folder, self.context.recipe, step, shown, again=evaluate_again, on_log=on_log)
            self.trace = trace.Trace(folder, step, begin=self.context.recipe.from_step)
            train, settings, steps = self.context.shards.train, self.context.settings, self.length.steps(step)
            self.tracker.plan(steps)
            self.tracker.begin(
                step,
                (steps - step) * step_seconds,
                tokens_per_step=self.context.recipe.train.tokens_per_step,
                parameters=self.state.parameters,
                unique_tokens=train.tokens,
                bytes_per_token=train.text_bytes / train.tokens,
                device=self.context.device.type,
                precision=settings.precision,
                threads=settings.threads,
                **shown,
            )

    def flush(self) -> None:
        """Make the records durable, as a checkpoint is about to rest on them."""
        for each in (self.tracker, self.trace):
            if each is not None:
                each.flush()

    def close(self) -> None:
        for each in (self.tracker, self.trace):
            if each is not None:
                each.close()

    def event(self, step: int, text: str, **details: Any) -> None:
        if self.tracker is not None:
            self.tracker.event(step, text, **details)
        else:
            process.say(text)

    def check(self, saved: Callable[[], int]) -> None:
        """Read which of the last updates were left out because loss or gradient was not finite.

        Records each. DivergedError under train.on_nonfinite = stop: no update since has touched the weights. `saved`
        tells it the step of the newest checkpoint, -1 before there is one.
        """
        flags, last = self.gradient_step.finite_flags, self.state.step
        finite = torch.stack(flags).tolist() if flags else []
        flags.clear()
        kept = f"{self.context.folder / 'checkpoints'} holds what was saved before"
        for step in [last - len(finite) + index + 1 for index, flag in enumerate(finite) if not flag]:
            self.event(step, "loss or gradient not finite: the update was left out", texts=self._texts(step))
            if self.context.recipe.train.on_nonfinite == "stop":
                raise DivergedError(
                    f"the loss or the gradient of step {step} was not finite and has touched nothing; {kept}. Lower "
                    f"train.learning_rate under another run=NAME, use train.on_nonfinite=skip, or leave its batch out: "
                    f"{self._without_batch(step, saved())}"
                )
        if self.state.scale.item() < FP16_LEAST:
            fault = f"the gradient of step {last} is not finite in fp16 at any loss scale and has touched nothing"
            mend = "Use another run=NAME with machine.precision=bf16 or fp32, or with a lower train.learning_rate"
            raise DivergedError(f"{fault}; {kept}. {mend}")

    def _without_batch(self, step: int, saved: int) -> str:
        """Overrides of a run that goes on from the newest checkpoint and skips the batch that `step` read."""
        recipe = self.context.recipe
        batch = self.context.loader(1).first(step - 1) // recipe.windows_per_step + 1
        source = f"{recipe.run}/step-{saved:06d}" if saved >= 0 else recipe.from_
        start = f"from={source} " if source else ""
        return f"run=NAME {start}'train.skip=[{','.join([*recipe.train.skip, str(batch)])}]'"

    def _texts(self, step: int, most: int = 4) -> list[str]:
        """Beginnings of the first windows that update `step` read."""
        first, recipe = self.context.loader(1).first(step - 1), self.context.recipe
        train, decode = self.context.shards.train, self.context.tokenizer.decode
        most = min(most, recipe.windows_per_step)
        windows = (self.context.order.ids(train, first + number) for number in range(most))
        return [decode(ids[:60].tolist()) for ids in windows]

    def record(self, loss: Tensor) -> None:
        """Add this step to the trace."""
        sums = trace.checksum(self.state.weights(), self.context.sharding)
        if self.trace is None:
            return
        loader, per_step = self.context.loader(1), self.context.recipe.windows_per_step
        read = [loader.first(step) + np.arange(per_step) for step in range(self.trace.step, self.state.step)]
        self.trace.add(
            self.state.step,
            windows=trace.windows(self.context.order, np.concatenate(read)) if read else "",
            loss=float(loss).hex(),
            weights=f"{mix(*sums.tolist()):016x}",
        )

    def log(self, loss: Tensor, norm: Tensor, step_seconds: float, utilisation: float) -> None:
        if self.tracker is None:
            return
        train, step = self.context.recipe.train, self.state.step
        self.tracker.log(
            step,
            loss=loss,
            learning_rate=train.learning_rate * self.length.lr_factor(step - 1),
            gradient_norm=norm,
            tokens_per_second=train.tokens_per_step / step_seconds,
            epoch=self.context.epochs_seen(step),
            seconds_left=(self.length.steps(step) - step) * step_seconds,
            utilisation=utilisation,
            memory=peak_memory(self.context.device),
        )
