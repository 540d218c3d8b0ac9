"""python -m llm.show RUN --step N: what a step read. python -m llm.show RUN_A RUN_B: where two runs part."""

import argparse
from pathlib import Path
from typing import Any

from llm.errors import RecipeError, run


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
    from llm.runs import find

    folders = [find(name)[0] for name in given.runs]
    if given.step is not None:
        show_step(folders[0], given.step, given.world, given.characters)
    else:
        for line in differences(*folders):
            print(line)


def show_step(folder: Path, step: int, world: int, characters: int) -> None:
    """Print every window of the batch that this step reads, by process and micro-batch."""
    from llm import borrowed
    from llm.budget import RECORD as PLAN
    from llm.order import Order
    from llm.recipe import load, skipped
    from llm.shards import of_run
    from llm.store import read_sealed
    from llm.stream import Stream

    recipe = load(folder / "recipe.yaml")
    steps = read_sealed(folder / PLAN)["plan"][-1][1] if recipe.train.hours else recipe.train.steps
    if step > steps:
        raise RecipeError(f"--step = {step}: the run has {steps} steps")
    machine = read_sealed(folder / "machine.json")
    world = world or int(machine["world"])
    shards = of_run(folder)
    tokenizer = borrowed.load(folder / "tokenizer")
    order = Order(recipe.seed, shards.train.tokens, recipe.model.context)
    micro_batch = int(machine["micro_batch"])
    if recipe.windows_per_step % (world * micro_batch):
        raise RecipeError(
            f"--world = {world}: {recipe.windows_per_step} windows in micro-batches of {micro_batch} cannot be so dealt"
        )
    print(f"step {step} of {folder.name} reads:")
    for rank in range(world):
        stream = Stream(shards.train, order, recipe.windows_per_step, micro_batch, rank, world, skipped(recipe))
        for number, positions in enumerate(stream.positions(step - 1)):
            starts = order.starts(positions).tolist()
            for position, start in zip(positions.tolist(), starts, strict=True):
                ids = shards.train.read(start, start + recipe.model.context + 1).tolist()
                text = tokenizer.decode(ids)
                epoch = position // order.windows
                print(f"\n--- process {rank}, micro-batch {number}, position {position}, epoch {epoch}, token {start}")
                print(text if not characters or len(text) <= characters else f"{text[:characters]} ...")


def differences(a: Path, b: Path) -> list[str]:
    """Lines that say which keys of two runs' recipes differ, and from which step on the runs do."""
    from llm.fingerprints import read
    from llm.recipe import flat, load

    recipes = [flat(load(folder / "recipe.yaml")) for folder in (a, b)]
    lines = [
        f"{name}: {recipes[0].get(name)} | {recipes[1].get(name)}"
        for name in recipes[0]
        if recipes[0].get(name) != recipes[1].get(name)
    ]
    records = [{line["step"]: line for line in read(folder)} for folder in (a, b)]
    common = sorted(records[0].keys() & records[1].keys())
    if not common:
        return [*lines, f"{a.name} and {b.name} have no step in common in their records"]
    for before, step in zip([None, *common], common, strict=False):
        what = parted(records[0][step], records[1][step])
        if what:
            since = f"they agree up to step {before}" if before is not None else "they never agreed"
            return [*lines, f"{a.name} and {b.name} part at step {step}: {what}; {since}"]
    last = f"all {len(common)} common steps of their records, up to step {common[-1]}"
    return [*lines, f"{a.name} and {b.name} agree to the bit in {last}"]


def parted(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What differs first between two lines of the record: windows, loss or weights; empty where nothing does."""
    if a["windows"] != b["windows"]:
        return "they read other windows"
    if a["loss"] != b["loss"]:
        losses = [float.fromhex(line["loss"]) for line in (a, b)]
        losses = [float.fromhex(line["loss"]) for line in (a, b)]
        return f"their losses are {losses[0]:.6f} and {losses[1]:.6f} on the same windows"
    if a["weights"] != b["weights"]:
        return "same windows, same loss, other weights"
    return ""


if __name__ == "__main__":
    run(main)
