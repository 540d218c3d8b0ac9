"""Saving a run and resuming it: what a checkpoint holds, which one is taken, and what must agree with the recipe."""

import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError
from llm.config.schema import Recipe, flat, science
from llm.data.reuse import difference
from llm.data.shards import of_run
from llm.distributed import process
from llm.interop import pretrained
from llm.interop.hf_files import model_files, tokenizer_files
from llm.model import hf_config
from llm.model.transformer import Transformer
from llm.run_folder import checkpoint, record, tensor_files
from llm.run_folder.background import BackgroundWork
from llm.run_folder.checkpoint import Checkpoint
from llm.run_folder.model_card import FILE_NAME as CARD
from llm.run_folder.model_card import model_card
from llm.training import teachers
from llm.training.context import RunContext, TrainState
from llm.training.evaluation import Evaluator
from llm.training.length import Length
from llm.training.micro_batch import MicroBatches
from llm.training.mismatch import refuse_difference, refuse_parent, refuse_parts, refuse_skip_beyond
from llm.training.state_copy import StateCopy


class Checkpoints:
    """Saves and loads the state. `saved` is the step of the newest checkpoint, -1 before there is one.

    `writing` may still be at work on that one; it must be polled at every step, and waited for at the end.
    """

    def __init__(
        self, context: RunContext, state: TrainState, length: Length, micro_batches: MicroBatches, evaluator: Evaluator
    ) -> None:
        self.context, self.state, self.length = context, state, length
        self.micro_batches, self.evaluator, self.monitor = micro_batches, evaluator, evaluator.monitor
        self.saved = -1
        self.writing, self.copy = BackgroundWork(context.coordinator), StateCopy()
        self.taught_by: list[Transformer] = []
        self.teachers: list[str] = []  # digests of the teachers' weights, from `resume` on
        self.identity = ""  # by which the run knows its checkpoints, from `resume` on
        self.parent: dict[str, Any] | None = None  # the checkpoint or folder that this run began from
        self.extra_files = tokenizer_files(context.tokenizer, chat=context.shards.is_chat)
        if context.parts.model is None:  # else no config.json of ours would tell the truth
            family = hf_config.family_of(context.recipe, checkpoint.folders(context.folder))
            self.extra_files |= model_files(
                context.recipe.model, context.tokenizer, family, chat=context.shards.is_chat
            )

    # ------------------------------------------------------------------ saving

    def save(self, *, evaluation_due: bool, in_background: bool) -> None:
        """Save this step unless that is done. If an evaluation is due, `complete` adds its results afterwards.

        `in_background`: training goes on at once, and the checkpoint is written meanwhile, where there is memory for a
        copy of the state. It counts when it is durable; until then an error of it reaches `writing`.
        """
        self.writing.wait()
        step = self.state.step
        if self.saved == step:
            return
        self.monitor.check(self.durable_step)
        card = {CARD: self._card()}
        draft = checkpoint.Draft(
            checkpoint.folder_of(self.context.folder, step),
            weights=self.state.weights(),
            moments=self.state.optimizer.moments,
            manifest=deepcopy(self._manifest()),  # the plan and the curve grow
            extra_files=self.extra_files if evaluation_due else {**self.extra_files, **card},
            unlisted_files=card if evaluation_due else {},
            coordinator=self.context.coordinator,
            sharding=self.context.sharding,
        )
        allocate, fill, finish = map(self._in_run, (draft.allocate, draft.fill, draft.finish))
        retain = partial(self._retain, step)
        if in_background and self.copy.take(draft):
            draft.together(allocate)
            begin, end = partial(_do, self.monitor.flush, fill), partial(_do, finish, retain)
            # A file that several ranks write is whole when all of them are done.
            parts = [begin, end] if draft.shared else [partial(_do, begin, end)]
            self.writing.begin(parts, abandon=draft.abandon, hurry=draft.give_up)
        else:
            self.monitor.flush()
            draft.together(allocate, fill, finish)
            if not evaluation_due:
                retain()
        self.saved = step

    def durable_step(self) -> int:
        """The step of the newest checkpoint, -1 before there is one, after it has been written."""
        self.writing.wait()
        return self.saved

    def complete(self) -> None:
        """Add the evaluation of this step to its checkpoint, and the model card that shows it."""
        self.monitor.flush()
        with self.context.coordinator.error_barrier():
            if self.context.coordinator.writes:
                folder = checkpoint.folder_of(self.context.folder, self.state.step)
                with checkpoint.still_there(self.context.folder):
                    checkpoint.amend(folder, {CARD: self._card()}, **self.evaluator.results())
        self._retain(self.state.step)

    def _in_run(self, part: Callable[[], None]) -> Callable[[], None]:
        """The part of a save; DiskError from the rank that writes where the run's folder was removed meanwhile."""
        return checkpoint.still_there(self.context.folder)(part) if self.context.coordinator.writes else part

    def _retain(self, step: int) -> None:
        if self.context.coordinator.writes:
            checkpoint.retain(self.context.folder, self.context.recipe.checkpoint.keep, step)

    def _card(self) -> bytes:
        context, curve = self.context, self.evaluator.curve
        shards, step, parts = context.shards, self.state.step, context.parts.names()
        epochs = context.epochs_seen(step) if shards.is_chat or context.recipe.text.sources else None
        return model_card(context.recipe, context.tokenizer, shards, step, curve, self.state.parameters, parts, epochs)

    def _manifest(self) -> dict[str, Any]:
        context, state = self.context, self.state
        decides = science(context.recipe)
        machine = {name: value for name, value in flat(context.recipe).items() if name not in decides}
        machine |= context.settings.keys(self.micro_batches.size)
        own: dict[str, Any] = {"parts": context.parts.names()} if context.parts.names() else {}
        own |= {"chat": True} if context.shards.is_chat else {}
        own |= {"teachers": self.teachers} if self.teachers else {}
        return {
            "run": self.identity,
            "step": state.step,
            "science": decides,
            "machine": {**machine, "world": process.world(), "torch": torch.__version__},
            "tokenizer": context.tokenizer.fingerprint,
            "data": context.shards.fingerprint,
            "parent": self.parent,
            "budget": self.length.record(),
            **self.evaluator.results(),
            "scale": [state.scale.item(), state.good_steps.item()],
            **own,
        }

    # ------------------------------------------------------------------ resuming

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, else from the recipe's `from` or `model.from`, else begin.

        RefusedError if the checkpoint has another science half, text or tokenizer.
        """
        recipe, found = self.context.recipe, self._newest()
        budget = (found.manifest.get("budget") if found else None) or {}
        if found is not None and (budget.get("finished") or 0 < recipe.train.steps <= found.step):
            self.teachers = found.manifest.get("teachers", [])  # nothing is left to learn
        else:
            with self.context.coordinator.error_barrier():
                self.taught_by, self.teachers = teachers.load(self.context)
        if self.taught_by:
            self.state.model.teachers = tuple(self.taught_by)
        self.identity = self._identify(found)
        self.length.resume(budget or None)
        if found is not None:
            refuse_parts(found, self.context.parts)
            refuse_difference(found, recipe, self.context.tokenizer.fingerprint, self.context.shards.fingerprint)
            teachers.refuse_others(recipe.train.teachers, self.teachers, found.manifest.get("teachers", []))
            self._load(found)
            self.saved, self.parent = found.step, found.manifest["parent"]
            # From the main rank, as the disks of several machines may have kept others.
            results = {name: found.manifest.get(name) for name in self.evaluator.results()}
            self.evaluator.resume(self.context.coordinator.from_main("evaluated", results))
        else:
            refuse_skip_beyond(recipe)
            if self.context.coordinator.writes and (done := record.read(self.context.folder).step):
                process.warn(f"run {recipe.run} has no checkpoint left of the {done:,} steps on record: it begins anew")
        if found is None and recipe.from_:
            self._begin_from(recipe.from_)
        elif found is None and recipe.model.from_:
            folder = atomic_io.expanded(recipe.model.from_)
            self.parent = {"model": folder.name, "digest": pretrained.load(folder, self.state.weights())}
        self.length.refuse_gap(self.state.step, resumed=found is not None)

    def _begin_from(self, name: str) -> None:
        """Load the checkpoint RUN/step-N of another run, which becomes this run's parent."""
        folder = named_by_from(self.context.recipe, self.context.folder.parent)
        source = checkpoint.open_checkpoint(folder)
        refuse_parent(source, self.context.recipe, self.context.parts, self.context.tokenizer)
        self._load(source)
        self._tell_growth(name, folder.parent.parent)
        kept = {"digest": source.digest, "science": source.manifest["science"], "data": source.manifest["data"]}
        self.parent = {"from": name, **kept}

    def _tell_growth(self, name: str, run: Path) -> None:
        """Say what the text holds that the run did not read, as far as its shards are there."""
        ours = self.context.shards
        with suppress(RefusedError):
            if (found := difference(ours, of_run(run))) is not None and found != (0, 0):
                process.say(f"text: {found[0]:,} documents are new since {name}, {found[1]:,} are gone")

    def _identify(self, found: Checkpoint | None) -> str:
        """The identity of the run that goes on from `found`, or a new one.

        RefusedError if this disk's checkpoint belongs to another run than that of the main rank's disk.
        """
        of_checkpoint = found.manifest.get("run") if found else None
        of_folder = None
        try:
            of_folder = checkpoint.identity(self.context.folder) if found else None
        except RefusedError as error:
            process.warn(f"{error}; it is written anew")
        mine = of_folder or of_checkpoint or self._new_identity()
        agreed = str(self.context.coordinator.from_main("identity", mine))
        if of_checkpoint and of_checkpoint != agreed:
            fault = f"of process {process.rank()} is of another run than that of process 0: copy that one there"
            raise RefusedError(f"{self.context.folder / 'checkpoints'} {fault}")
        return agreed

    def _new_identity(self) -> str:
        """Digest of everything that decides the bits of a run that begins here, as long as its machine half stays."""
        context = self.context
        machine = {name: value for name, value in flat(context.recipe).items() if name.startswith("machine.")}
        machine |= context.settings.keys(context.settings.micro_batch or "auto")
        machine |= {"machine.stop_after": 0, "device": context.device.type, "world": process.world()}
        by_the_clock = secrets.token_hex(8) if context.recipe.train.hours else ""  # its plan is like no other
        data = [context.tokenizer.fingerprint, context.shards.fingerprint]
        parts = [science(context.recipe), machine, torch.__version__, *data, by_the_clock, *self.teachers]
        return atomic_io.digest_of(parts)[:16]

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint that is valid on every disk of the group."""
        bound, coordinator, folder = sys.maxsize, self.context.coordinator, self.context.folder
        while True:
            with coordinator.error_barrier():
                found = checkpoint.newest(folder, process.warn, bound) if coordinator.writes else None
            mine = found.step if found else -1
            newest = coordinator.largest(mine)
            oldest = -coordinator.largest(-(mine if coordinator.writes else newest))
            if oldest == newest:
                path = checkpoint.folder_of(folder, newest)
                return Checkpoint(path, checkpoint.read_manifest(path)) if newest >= 0 else None
            with coordinator.error_barrier():
                if coordinator.writes and mine < 0:
                    fault = f"{folder} has no checkpoint on the disk of process {process.rank()}"
                    raise RefusedError(f"{fault}, others have step {newest}: copy it there")
            bound = oldest

    def _load(self, source: Checkpoint) -> None:
        tensor_files.load_tensors(source.folder / checkpoint.WEIGHTS, self.state.weights())
        tensor_files.load_tensors(source.folder / checkpoint.MOMENTS, self.state.optimizer.moments)
        self.state.step = source.step
        scale, good_steps = source.manifest["scale"]
        self.state.scale.fill_(scale)
        self.state.good_steps.fill_(good_steps)


def named_by_from(recipe: Recipe, runs: Path) -> Path:
    """The checkpoint RUN/step-N that `from` names. RecipeError where it is not there."""
    run = runs / str(recipe.from_).partition("/")[0]
    folder = checkpoint.folder_of(run, recipe.from_step)
    if not folder.is_dir():
        there = ", ".join(each.name for each in checkpoint.folders(run)) or "none"
        raise RecipeError(f"from = {recipe.from_} is not there; checkpoints of {run.name}: {there}")
    return folder


def _do(*acts: Callable[[], None]) -> None:
    for act in acts:
        act()
