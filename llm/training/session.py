"""The life of a run in this process: meet the other ranks, prepare, lock the folder, train, record how it ended."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from llm.base import atomic_io
from llm.base.durations import readable
from llm.base.errors import GroupError, LLMError, RecipeError, RefusedError, as_llm_error, reason
from llm.config.reading import dump, with_checksum
from llm.config.schema import Recipe
from llm.data import mixture, pipeline
from llm.data.shards import AnyShards, keep_place
from llm.data.sources import refuse_missing
from llm.data.tokenizer import Tokenizer
from llm.distributed import process
from llm.distributed.coordinator import Coordinator
from llm.distributed.environment import (
    DTYPES,
    as_it_was,
    die_with_parent,
    has_accelerator,
    one_run_at_a_time,
    start_group,
)
from llm.distributed.sharding import Sharding
from llm.distributed.team import meet
from llm.interop.pretrained import ready
from llm.model import cost
from llm.run_folder import checkpoint
from llm.run_folder.checkpoint import Checkpoint
from llm.run_folder.record import METRICS
from llm.training import compiling, own_data, teachers
from llm.training.context import Parts, RunContext
from llm.training.memory import clear_tracebacks, is_out_of_memory
from llm.training.mismatch import refuse_parent, refuse_skip_beyond
from llm.training.resume import named_by_from
from llm.training.trainer import Trainer

Prepare: TypeAlias = Callable[..., tuple[Recipe, Tokenizer, AnyShards]]


@dataclass
class Start:
    """One start of a run: whether it made the run's folder, and whether it has begun to train or was refused before."""

    new: bool = False
    begun: bool = False

    def is_refused_by(self, error: BaseException) -> bool:
        """Whether `error` refuses this start for its recipe, text or folder, before any training has begun."""
        refused = isinstance(error, LLMError) and error.status in (RecipeError.status, RefusedError.status)
        return refused and not self.begun


def train(
    recipe: Recipe, prepare: Prepare = ready, until: int = -1, *, runs: Path = Path("runs"), parts: Parts | None = None
) -> Path:
    """Train or resume a run in this process; its folder. The process is left as it was found.

    `prepare` gives the recipe with its length, the tokenizer and the shards; where there are several machines it takes
    a `team`, as `ready` does. With `until` the run stops after that step as a signal would stop it.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise RecipeError("the working folder was removed: change to one that is there") from None
    try:
        with one_run_at_a_time(), as_it_was():
            return _train(recipe, prepare, until, runs / recipe.run, parts or Parts())
    except (LLMError, KeyboardInterrupt) as error:
        clear_tracebacks(error)  # a notebook keeps the last one, and with it the model
        raise
    finally:
        if hasattr(sys, "ps1") or has_accelerator():  # else the process ends, or has no model to share its memory with
            gc.collect()


def _train(recipe: Recipe, prepare: Prepare, until: int, run: Path, parts: Parts) -> Path:
    die_with_parent()
    accelerator, coordinator, settings = start_group(recipe, run)
    with coordinator.error_barrier():
        _check_names(recipe, run, parts)
    recipe, tokenizer, shards = _data(recipe, prepare, run, coordinator, parts)
    start = Start(new=not run.exists())
    with coordinator.error_barrier():
        found = {"the text's": shards.fingerprint[:12], "the tokenizer's": tokenizer.fingerprint[:12]}
        data = {f"{name} fingerprint": value for name, value in found.items()}
        coordinator.agree("data", data, "give every machine the same files")
    coordinator.meet_on_disk(run)
    with _locked(run, coordinator), _status(run, start), _undone_if_refused(run, start, coordinator):
        sharding = Sharding(settings.shard, accelerator.device, DTYPES[settings.precision])
        if parts.model is not None:  # a caller's, whose cost is unknown
            settings = replace(settings, compile=bool(settings.compile))
        settings = compiling.with_compile(settings, recipe, tokenizer.vocab_size, accelerator.device, coordinator)
        context = RunContext(recipe, settings, tokenizer, shards, accelerator, coordinator, sharding, run, parts)
        _run(context, until, start)
    coordinator.leave()
    return run


def _check_names(recipe: Recipe, run: Path, parts: Parts) -> None:
    """A new run refused for a name that leads nowhere, or that does not fit: now, not once its text is prepared."""
    if process.rank() == 0 and not checkpoint.folders(run):
        refuse_missing(pipeline.also(recipe))
        given = recipe.tokenizer.path
        tokenizer = Tokenizer.load(atomic_io.expanded(given)) if given else None
        if recipe.from_:
            folder = named_by_from(recipe, run.parent)
            refuse_parent(Checkpoint(folder, checkpoint.read_manifest(folder)), recipe, parts, tokenizer)
        refuse_skip_beyond(recipe)
        teachers.find(recipe, parts, tokenizer)


def _data(
    recipe: Recipe, prepare: Prepare, run: Path, coordinator: Coordinator, parts: Parts
) -> tuple[Recipe, Tokenizer, AnyShards]:
    """The run's own data if every machine has it, so that it resumes without its text; otherwise that of `prepare`."""
    found = coordinator.first(lambda: None if parts.documents else own_data.find(recipe, run))
    if coordinator.largest(int(found is None), patient=True):
        team = meet(coordinator, atomic_io.expanded(recipe.text.cache or "data"))

        def act() -> tuple[Recipe, Tokenizer, AnyShards]:
            own = replace(recipe.tokenizer, path=own_data.tokenizer_path(recipe, run))
            ours = replace(recipe, tokenizer=own)
            with team or nullcontext():
                complete, tokenizer, shards = prepare(ours, team=team) if team else prepare(ours)
            said = replace(complete.tokenizer, path=recipe.tokenizer.path)
            return replace(complete, tokenizer=said), tokenizer, shards

        prepared: tuple[Recipe, Tokenizer, AnyShards] = coordinator.first(act)
        return prepared
    with coordinator.error_barrier(patient=True):
        if process.rank() == 0:
            own_data.tell_change(recipe, run, found[2], process.say)
    assert found is not None
    return found


@contextmanager
def _locked(run: Path, coordinator: Coordinator) -> Iterator[None]:
    """Hold the lock of the run folder. RefusedError if another process holds it."""
    with atomic_io.lock(run / "lock") if coordinator.writes else nullcontext(True) as mine:
        with coordinator.error_barrier():
            if not mine:
                raise RefusedError(f"run {run.name} is held by another process: wait for it, or take another run=NAME")
        yield


@contextmanager
def _status(run: Path, start: Start) -> Iterator[None]:
    """Record in status.json how the run ended: some launchers turn every exit status into 1.

    A start that is refused leaves the record of an earlier ending as it was.
    """
    if process.rank() != 0:
        yield
        return
    path = run / "status.json"
    earlier = path.read_bytes() if path.is_file() else b""
    atomic_io.write_json(path, {"status": None, "message": "running", "process": os.getpid()})
    try:
        yield
    except BaseException as error:  # of any kind: a run that has ended must not be "running"
        known = as_llm_error(error) or error
        status = known.status if isinstance(known, LLMError) else 130 if isinstance(known, KeyboardInterrupt) else 1
        ending = atomic_io.as_json({"status": status, "message": reason(known)})
        data = earlier if earlier and start.is_refused_by(known) else ending
        try:
            if run.is_dir():  # it may have been removed meanwhile
                atomic_io.write_bytes(path, data)
        except OSError:  # a disk without room for another file may still have room in this one
            with suppress(OSError):
                atomic_io.write_at(path, [(0, data)])
                os.truncate(path, len(data))
        raise
    if run.is_dir():
        atomic_io.write_json(path, {"status": 0, "message": "finished"})


@contextmanager
def _undone_if_refused(run: Path, start: Start, coordinator: Coordinator) -> Iterator[None]:
    """Remove the run folder if a start that was refused created it and nothing was trained in it."""
    try:
        yield
    except LLMError as error:
        empty = not checkpoint.folders(run) and not (run / METRICS).exists()
        if start.new and start.is_refused_by(error) and empty and coordinator.writes:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _run(context: RunContext, until: int, start: Start) -> None:
    """Train a run whose folder this process holds."""
    coordinator, run = context.coordinator, context.folder
    if coordinator.writes:
        for folder in (run, run / "checkpoints", run / "tokenizer", *checkpoint.folders(run)):
            atomic_io.sweep(folder)
    with _causes_named(coordinator, lambda: "to begin: take a smaller model, or machine.shard=full"):
        trainer = Trainer(context, stop_at=until)
        with coordinator.error_barrier():
            trainer.checkpoints.resume()
    with coordinator.error_barrier():
        began = {"began from": trainer.checkpoints.parent, "teachers": trainer.checkpoints.teachers}
        coordinator.agree("weights", began, "give every machine the same files")
    step = trainer.state.step
    if trainer.length.plan and step >= trainer.steps and not trainer.owes_evaluation:
        process.say(
            f"run {run.name} is finished: {step} steps are done, there is nothing to do.\n"
            f"To train on: run=NAME from={run.name}/step-{step:06d} "
            f"train.steps={2 * step} (or more; lengths count from step 0)"
        )
        return
    mend = "take a smaller machine.micro_batch, or machine.recompute=true"
    with trainer.stop.on_signals():
        try:
            with _causes_named(coordinator, lambda: f"after step {trainer.state.step}: {mend}"):
                step_seconds = trainer.micro_batches.rehearse()
                start.begun = True
                _write_run_files(trainer)
                trainer.length.begin(step, step_seconds)
                process.say(_announcement(trainer, step_seconds))
                trainer.fit(step_seconds)
        finally:
            try:
                trainer.checkpoints.writing.close()
            finally:
                trainer.monitor.close()


@contextmanager
def _causes_named(coordinator: Coordinator, when: Callable[[], str]) -> Iterator[None]:
    """GroupError where memory ends, which says `when` and the mend, or where a peer is gone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise GroupError(f"no memory {when()} ({' '.join(str(error).split())[:120]})") from error
        blamed = coordinator.blamed(error) if isinstance(error, RuntimeError) else error
        if blamed is error:
            raise
        raise blamed from error


def _write_run_files(trainer: Trainer) -> None:
    """Write what the run folder keeps beside checkpoints: recipe, settings, tokenizer, and where the shards are."""
    context, run = trainer.context, trainer.context.folder
    with context.coordinator.error_barrier():
        if context.coordinator.writes:
            atomic_io.write_checksummed(run / checkpoint.IDENTITY, {"run": trainer.checkpoints.identity})
            atomic_io.write_bytes(run / "recipe.yaml", with_checksum(dump(context.recipe)).encode())
            keep_place(context.shards, run)
            trainer.micro_batches.save_settings()
            context.tokenizer.save(run / "tokenizer")


def _announcement(trainer: Trainer, step_seconds: float) -> str:
    """Lines on the run that is about to start or to go on: sizes, length, time and memory."""
    context, recipe, step, steps = trainer.context, trainer.recipe, trainer.state.step, trainer.steps
    settings, per_step = context.settings, recipe.train.tokens_per_step
    parameters, (memory, traffic) = trainer.state.parameters, trainer.costs()
    start = f" from step {step:,}" if step else ""
    lines = [
        f"{'resuming' if start else 'training'} {recipe.run}{start}: {parameters / 1e6:.2f} M parameters, "
        f"{context.device.type}, {settings.precision}, {process.world()} x {settings.threads} threads",
        f"{steps:,} steps of {per_step:,} tokens = {steps * per_step / 1e6:.2f} M tokens, "
        f"{context.epochs_seen(steps):.2f} epochs; about {readable((steps - step) * step_seconds)}"
        f"{', to be revised as the speed shows' if recipe.train.hours else ''}",
        f"memory: {cost.size(memory.total)} a process (weights {cost.size(memory.weights)}, gradients "
        f"{cost.size(memory.gradients)}, moments {cost.size(memory.moments)})",
        *mixture.lines(recipe, context.order, steps),
        f"micro-batches of {trainer.micro_batches.size} windows"
        f"{f', {cost.size(traffic.total)} of traffic a step from each process' if traffic.total else ''}",
    ]
    if taught_by := trainer.checkpoints.taught_by:
        theirs = sum(weight.numel() for teacher in taught_by for weight in teacher.parameters())
        lines.append(f"teachers: {', '.join(recipe.train.teachers)}, {cost.size(4 * theirs)} more in each process")
    if not context.tokenizer.is_portable:
        lines.append(
            "the vocabulary is not byte-fallback BPE: checkpoints go without tokenizer.json, transformers opens "
            "their model alone; the run keeps tokenizer/tokenizer.model for sentencepiece"
        )
    return "\n".join(lines)
