"""python -m llm.show RUN --step N: what a step read. python -m llm.show RUN_A RUN_B: where two runs part."""

import argparse
from pathlib import Path

from llm.base.errors import RecipeError, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.show",
        description="With one run: the texts that one step read, from the recipe alone. With two: the first step at "
        "which they part, and the keys of their recipes that differ.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name of a run under runs/, or its folder")
    parser.add_argument(
        "--step", type=int, help="the update whose batch is shown, counted as the run's messages count: 1 is the first"
    )
    parser.add_argument(
        "--world", type=int, default=0, help="deal the batch to this many processes (default: the run's)"
    )
    parser.add_argument("--characters", type=int, default=300, help="of each text (default 300; 0: all)")
    given = parser.parse_args()
    if len(given.runs) > 2 or (len(given.runs) == 1) != (given.step is not None):
        raise RecipeError("name one run and --step N, or two runs")
    if given.step is not None and given.step < 1:
        raise RecipeError(f"--step = {given.step}: at least 1, the first step, is expected")
    return given


def main() -> None:
    given = arguments()
    from llm.run_folder.loaded_run import find
    from llm.run_folder.trace import differences

    folders = [find(name)[0] for name in given.runs]
    if given.step is not None:
        show_step(folders[0], given.step, given.world, given.characters)
    else:
        for line in differences(*folders):
            print(line)


def show_step(folder: Path, step: int, world: int, characters: int) -> None:
    """Print every window of the batch that this step reads, by process and micro-batch."""
    from llm.base.atomic_io import read_checksummed
    from llm.config.reading import load
    from llm.config.resolving import skipped
    from llm.data import hf_tokenizer
    from llm.data.batches import BatchLoader
    from llm.data.shards import of_run
    from llm.data.shuffle import WindowShuffle
    from llm.optim.time_budget import RECORD as PLAN

    recipe = load(folder / "recipe.yaml")
    steps = read_checksummed(folder / PLAN)["plan"][-1][1] if recipe.train.hours else recipe.train.steps
    if step > steps:
        raise RecipeError(f"--step = {step}: the run has {steps} steps")
    machine = read_checksummed(folder / "machine.json")
    world = world or int(machine["world"])
    shards = of_run(folder)
    tokenizer = hf_tokenizer.load(folder / "tokenizer")
    order = WindowShuffle(recipe.seed, shards.train.tokens, recipe.model.context)
    micro_batch = int(machine["micro_batch"])
    if recipe.windows_per_step % (world * micro_batch):
        raise RecipeError(
            f"--world = {world}: {recipe.windows_per_step} windows in micro-batches of {micro_batch} cannot be so dealt"
        )
    print(f"step {step} of {folder.name} reads:")
    for rank in range(world):
        stream = BatchLoader(shards.train, order, recipe.windows_per_step, micro_batch, rank, world, skipped(recipe))
        for number, positions in enumerate(stream.positions(step - 1)):
            starts = order.starts(positions).tolist()
            for position, start in zip(positions.tolist(), starts, strict=True):
                ids = shards.train.read(start, start + recipe.model.context + 1).tolist()
                text = tokenizer.decode(ids)
                epoch = position // order.windows
                print(f"\n--- process {rank}, micro-batch {number}, position {position}, epoch {epoch}, token {start}")
                print(text if not characters or len(text) <= characters else f"{text[:characters]} ...")


if __name__ == "__main__":
    run(main)
