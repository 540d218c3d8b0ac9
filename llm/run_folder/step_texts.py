"""The texts that one step of a run read, worked out from the recipe and the step alone."""

from collections.abc import Iterator
from pathlib import Path

from llm.base.atomic_io import read_checksummed
from llm.base.errors import RecipeError
from llm.config.reading import load
from llm.config.resolving import skipped
from llm.data import hf_tokenizer
from llm.data.batches import BatchLoader
from llm.data.chat_template import spoken
from llm.data.mixture import MixedShuffle, order_of
from llm.data.shards import of_run
from llm.optim.time_budget import RECORD as PLAN


def step_texts(folder: Path, step: int, world: int = 0, characters: int = 0) -> Iterator[str]:
    """Lines with every window of the batch that `step` (1 is the first) read, by process and micro-batch.

    The batch is split among `world` processes, or as many as the run has; texts are cut after `characters`. RecipeError
    where the run has no such step, or its batch cannot be split so.
    """
    recipe = load(folder / "recipe.yaml")
    steps = read_checksummed(folder / PLAN)["plan"][-1][1] if recipe.train.hours else recipe.train.steps
    if step > steps:
        raise RecipeError(f"--step = {step}: the run has {steps} step{'s' * (steps != 1)}")
    if step <= recipe.from_step:
        began = f"{folder.name} began at step {recipe.from_step + 1}, from {recipe.from_}"
        raise RecipeError(f"--step = {step}: {began}: name that run")
    machine = read_checksummed(folder / "machine.json")
    world, micro_batch, windows = world or int(machine["world"]), int(machine["micro_batch"]), recipe.windows_per_step
    if windows % (world * micro_batch):
        fault = f"{windows} windows in micro-batches of {micro_batch} cannot be split among {world} processes"
        most = windows // micro_batch
        mend = f"name a divisor of {most}" if most > 1 else "only 1 process can share the step"
        raise RecipeError(f"--world = {world}: {fault}: {mend}")
    shards, tokenizer = of_run(folder), hf_tokenizer.load(folder / "tokenizer")
    order = order_of(recipe, shards)
    yield f"step {step} of {folder.name} reads:"
    for rank in range(world):
        loader = BatchLoader(shards.train, order, windows, micro_batch, rank, world, skipped(recipe.train.skip))
        for number, positions in enumerate(loader.positions(step - 1)):
            starts = order.starts(positions).tolist()
            for position, start in zip(positions.tolist(), starts, strict=True):
                ids = order.ids(shards.train, position).tolist()
                name, inner, own = order.place(position) if isinstance(order, MixedShuffle) else ("", position, order)
                text = spoken(tokenizer, ids) if shards.sources[name].is_chat else tokenizer.decode(ids)
                at = f"position {position}, {f'{name}, ' if name else ''}epoch {inner // own.windows}, token {start}"
                yield f"\n--- process {rank}, micro-batch {number}, {at}"
                yield text if not characters or len(text) <= characters else f"{text[:characters]} ..."
