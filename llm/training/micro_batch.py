"""The micro-batch: found, halved where memory runs short, rehearsed before the first step, and compiled."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.base.errors import GroupError, RecipeError
from llm.config.resolving import divisors
from llm.data.batches import Batch
from llm.distributed import environment, process
from llm.model.loss import compile_loss
from llm.run_folder.checkpoint import still_there
from llm.training.context import RunContext, TrainState
from llm.training.memory import clear_tracebacks, within_memory

Event = Callable[[int, str], None]  # step, text


class MicroBatches:
    """`size` is the number of windows that one forward pass reads; 0 until `rehearse` has found it."""

    def __init__(self, context: RunContext, state: TrainState, wrapped: Any, event: Event) -> None:
        self.context, self.state, self.wrapped, self.event = context, state, wrapped, event
        self.size = context.settings.micro_batch
        self.compile_wanted, self.compiled = bool(context.settings.compile), False
        self.windows = context.recipe.windows_per_step // process.world()  # of a step, for this rank

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of update `step`, on the device."""
        return [batch.to(self.context.device) for batch in self.context.loader(self.size).at(step)]

    def accumulate(self, step: int, accumulate: Callable[[list[Batch]], Tensor]) -> Tensor:
        """`accumulate` over the batch of `step`, again in smaller micro-batches if memory runs out.

        Weights and moments change only after all gradients are there, so the step is simply repeated.
        """
        while (sums := within_memory(lambda: accumulate(self.batches(step)))) is None:
            self.halve(step + 1)
        return sums

    def halve(self, step: int, *, begun: bool = True) -> None:
        """Take the next smaller micro-batch. GroupError, with the setting that may do, if that is not possible."""
        was, settings = self.size, self.context.settings
        size = max((n for n in divisors(self.windows) if n <= was // 2), default=0)
        self.state.model.zero_grad(set_to_none=True)
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        short = f"no memory for micro-batches of {was} windows at step {step}"
        if not size:
            raise GroupError(f"{short}: use machine.recompute=true, or a smaller model.context or model.dim")
        # Other ranks already wait in a collective; otherwise the size was given, or it decides the bits.
        if process.world() > 1 or not settings.micro_batch_is_auto or settings.exact:
            other = "use another run=NAME" if settings.exact else "run the same command again"
            raise GroupError(f"{short}: {other} with machine.micro_batch={size}")
        if self.compiled:  # compile anew, as a process that starts with this size would
            torch._dynamo.reset()
        self.size, self.compiled = size, False
        if begun:  # before, the run's folder has no files yet, and gets this one with the others
            with still_there(self.context.folder):
                self.save_settings()
        self.event(step, f"{short}: repeating it, and going on, in micro-batches of {size}")

    def save_settings(self) -> None:
        """Record for the next start of this run what every `auto` came to."""
        settings = replace(self.context.settings, compile=self.compile_wanted)
        environment.save_settings(settings, self.size, self.context.folder)

    # ------------------------------------------------------------------ before the first step

    def rehearse(self) -> float:
        """Seconds that a step will take, measured on one micro-batch; weights and moments are left alone.

        On an accelerator, `auto` is settled here: the largest micro-batch that fits its memory.
        """
        if not self.size:
            self.size = self._largest_that_fits()
        while (seconds := within_memory(self._rehearse)) is None:
            self.halve(self.state.step + 1, begun=False)
        return seconds

    def _largest_that_fits(self) -> int:
        fits = 1
        for size in divisors(self.windows):
            fitted = within_memory(partial(self._forward_backward, size))
            if self.context.coordinator.largest(fitted is None):
                if self.context.sharding.sharded:  # FSDP2 stopped in the middle of a gather
                    mend = f"run the same command again with machine.micro_batch={fits}, or with machine.recompute=true"
                    raise GroupError(f"no memory for micro-batches of {size} windows: {mend}")
                break
            fits = size
        torch.cuda.empty_cache()
        return fits

    def _rehearse(self) -> float:
        """Seconds of a step, from one micro-batch and a masked update after a warm-up."""
        if self.compile_wanted and not self.compiled:
            self._compile()
        if not self.compiled:  # a compiled model would be compiled again for another size
            self._forward_backward(1)
        began = time.perf_counter()
        self._forward_backward(self.size)
        passed = time.perf_counter()
        for p in self.state.model.parameters():
            p.grad = torch.zeros_like(p)
        zero = torch.zeros((), device=self.context.device)
        self.state.optimizer.step(self.state.step, 0.0, zero + 1, zero > 0)
        self.state.model.zero_grad(set_to_none=True)
        return (passed - began) * (self.windows // self.size) + zero.item() + time.perf_counter() - passed

    def _compile(self) -> None:
        """Compile each block and say how long it took; go on without where this machine cannot."""
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        # A warning of the compiler about its own code.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        began, blocks = time.perf_counter(), self.state.model.blocks
        for block in blocks:
            block.compile()
        on_cpu, precision = self.context.device.type == "cpu", self.context.settings.precision
        compile_loss(not (on_cpu and precision == "fp32"))  # there products take nearly all of the time
        try:
            self._forward_backward(self.size)
        except TorchDynamoException as error:
            why = " ".join(str(error).split())[:160]
            if process.world() > 1:  # other ranks may be able to, and wait
                raise GroupError(f"machine.compile cannot be done here: use machine.compile=false ({why})") from None
            process.say(f"machine.compile cannot be done here, going on without ({why})")
            for block in blocks:
                block._compiled_call_impl = None
            compile_loss(False)
            clear_tracebacks(error)
            self.compile_wanted = False
            return
        self.compiled = True
        process.say(f"machine.compile: the blocks were compiled in {time.perf_counter() - began:.0f} s")

    def _forward_backward(self, size: int) -> float:
        """Loss of one micro-batch of this size, whose gradient is dropped."""
        context = self.context
        shape = (size, context.recipe.model.context)
        tokens = torch.arange(math.prod(shape), device=context.device).view(shape) % context.tokenizer.vocab_size
        has_segments = context.shards.is_chat or context.recipe.train.document_mask
        segments = torch.zeros_like(tokens) if has_segments else None
        with nullcontext() if context.sharding.sharded else context.accelerator.no_sync(self.wrapped):
            with context.accelerator.autocast():
                # Strides as in a real batch.
                loss = self.wrapped(*Batch(tokens, tokens, tokens[:, 0].contiguous(), segments).inputs)
            loss.backward()
        if context.parts.model is not None:
            named = self.state.model.named_parameters()
            if unused := next((name for name, p in named if p.grad is None), None):
                mend = "let it take part in every loss, or make it a buffer"
                raise RecipeError(f"model=: {unused} had no gradient in a trial step: {mend}")
        self.state.model.zero_grad(set_to_none=True)
        return loss.item()
