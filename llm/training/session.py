"""The life of a run in this process: meet the others, prepare, hold the folder, begin or go on, say how it ended."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from llm.base import atomic_io
from llm.base.errors import GroupError, LLMError, RefusedError, as_disk_error, reason
from llm.config.recipe import Machine, Recipe, dump, with_checksum
from llm.data.shards import Shards, keep_place
from llm.data.tokenizer import Tokenizer
from llm.distributed import coordinator, process
from llm.distributed.environment import as_it_was, die_with_parent, has_accelerator, save_settings, start_group
from llm.model import cost
from llm.run_folder import checkpoint
from llm.run_folder.metrics import readable
from llm.training.trainer import Trainer, clear_tracebacks, is_short_of_memory

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # each asks to finish the step, save and stop


def train(recipe: Recipe, prepare: Callable[[Recipe], tuple[Recipe, Tokenizer, Shards]], until: int = -1) -> Path:
    """The folder of the finished run. `prepare` gives the recipe with its length, the tokenizer and the shards.

    With `until` it stops after that step as a signal would stop it. The process is left as it was found.
    """
    try:
        with as_it_was():
            return _session(recipe, prepare, until)
    except (LLMError, KeyboardInterrupt) as error:
        clear_tracebacks(error)  # a notebook keeps the last one, and with it the model
        raise
    finally:
        if hasattr(sys, "ps1") or has_accelerator():  # else the process ends, or has no model to share its memory with
            gc.collect()


def _session(recipe: Recipe, prepare: Callable[[Recipe], tuple[Recipe, Tokenizer, Shards]], until: int) -> Path:
    asked, run = recipe.machine, Path("runs") / recipe.run
    die_with_parent()
    accelerator, council, recipe = start_group(recipe)
    recipe, tokenizer, shards = council.first(lambda: prepare(recipe))
    with council.error_barrier():
        data = {"the text": shards.fingerprint[:12], "the tokenizer": tokenizer.fingerprint[:12]}
        data = {f"{name}'s fingerprint": value for name, value in data.items()}
        council.agree("data", data, "give every machine the same files")
    council.meet_on_disk(run)
    with atomic_io.lock(run / "lock") if council.writes else nullcontext(True) as mine:
        with council.error_barrier():
            if not mine:
                raise RefusedError(
                    f"run {recipe.run} is held by another process: wait for it, or take another run=NAME"
                )
        with _status(run):
            _train(recipe, asked, tokenizer, shards, accelerator, council, run, until)
    council.leave()
    return run


@contextmanager
def _status(run: Path) -> Iterator[None]:
    """Keep in status.json how the run ended: some launchers turn every exit status into 1."""
    if process.rank() != 0:
        yield
        return
    path = run / "status.json"
    atomic_io.write_json(path, {"status": None, "message": "running", "process": os.getpid()})
    try:
        yield
    except BaseException as error:  # whatever it is: a run that has ended must not be "running"
        known = as_disk_error(error) or error if isinstance(error, OSError) else error
        status = known.status if isinstance(known, LLMError) else 130 if isinstance(known, KeyboardInterrupt) else 1
        said = {"status": status, "message": reason(known)}
        try:
            atomic_io.write_json(path, said)
        except OSError:  # a disk without room for another file may yet have it in this one
            with suppress(OSError):
                data = atomic_io.as_json(said)
                atomic_io.write_at(path, [(0, data)])
                os.truncate(path, len(data))
        raise
    atomic_io.write_json(path, {"status": 0, "message": "finished"})


def _train(
    recipe: Recipe,
    asked: Machine,
    tokenizer: Tokenizer,
    shards: Shards,
    accelerator: Accelerator,
    council: coordinator.Coordinator,
    run: Path,
    until: int,
) -> None:
    """The life of a run whose folder this process holds."""
    if council.writes:
        for folder in (run, run / "checkpoints", run / "tokenizer", *checkpoint.folders(run)):
            atomic_io.sweep(folder)
    trainer = Trainer(recipe, tokenizer, shards, accelerator, council, run)
    trainer.until, trainer.auto = until, asked.micro_batch == "auto"
    with council.error_barrier():
        trainer.resume()
    if trainer.plan and trainer.state.step >= trainer.steps and not trainer.owes_evaluation:
        process.say(
            f"run {recipe.run} is finished: {trainer.state.step} steps are done, there is nothing to do.\n"
            f"To train on: run=NAME from={recipe.run}/step-{trainer.state.step:06d} "
            f"train.steps={2 * trainer.state.step} (or more; lengths count from step 0)"
        )
        return
    for name in SIGNALS:
        number = getattr(signal, name, None)
        hung_up = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN  # nohup's wish
        if number and not hung_up:
            signal.signal(number, trainer.on_signal)
    try:
        _begin(trainer, replace(recipe, machine=asked))
        trainer.fit()
    except (RuntimeError, MemoryError) as error:
        if is_short_of_memory(error):
            raise GroupError(
                f"no memory after step {trainer.state.step}: take a smaller machine.micro_batch, or "
                f"machine.recompute=true ({' '.join(str(error).split())[:120]})"
            ) from error
        raise (council.blamed(error) if isinstance(error, RuntimeError) else error) from error
    finally:
        if trainer.tracker is not None:
            trainer.tracker.close()
        if trainer.record is not None:
            trainer.record.close()


def _begin(trainer: Trainer, asked: Recipe) -> None:
    """Keep the recipe as it was asked for, tokenizer and manifest in the run, and say what is coming."""
    step_seconds = trainer.rehearse()
    if trainer.budget is not None:
        trainer.budget.begin(trainer.state.step, trainer.council.from_main("step", step_seconds))
        trainer.keep_plan(trainer.budget)
    recipe, run, steps = trainer.recipe, trainer.run, trainer.steps
    with trainer.council.error_barrier():
        if trainer.council.writes:
            atomic_io.write_checksummed(run / checkpoint.IDENTITY, {"run": trainer.identity})
            atomic_io.write_bytes(run / "recipe.yaml", with_checksum(dump(asked)).encode())
            keep_place(trainer.shards, run)
            save_settings(recipe, run)
            trainer.tokenizer.save(run / "tokenizer")
    left, per_step = steps - trainer.state.step, recipe.train.tokens_per_step
    epochs = steps * recipe.windows_per_step / trainer.order.windows
    numbers = cost.parameters(recipe.model, trainer.tokenizer.vocabulary)
    memory, traffic = trainer.costs()
    began = f" from step {trainer.state.step:,}" if trainer.state.step else ""
    process.say(
        f"{'resuming' if began else 'training'} {recipe.run}{began}: {numbers / 1e6:.2f} M parameters, "
        f"{trainer.device.type}, {recipe.machine.precision}, {process.world()} x {recipe.machine.threads} threads\n"
        f"{steps:,} steps of {per_step:,} tokens = {steps * per_step / 1e6:.2f} M tokens, {epochs:.2f} epochs; "
        f"about {readable(left * step_seconds)}"
        f"{', to be revised as the speed shows' if trainer.budget is not None else ''}\n"
        f"each process holds {cost.size(memory.total)}: weights {cost.size(memory.weights)}, gradients "
        f"{cost.size(memory.gradients)}, moments {cost.size(memory.moments)}\n"
        f"micro-batches of {recipe.machine.micro_batch} windows"
        f"{f', {cost.size(traffic.total)} sent a step by each process' if traffic.total else ''}"
    )
    if not trainer.tokenizer.is_portable:
        process.say(
            "the vocabulary is not byte-fallback BPE: checkpoints go without tokenizer.json, transformers opens "
            "their model alone; the run keeps tokenizer/tokenizer.model for sentencepiece"
        )
