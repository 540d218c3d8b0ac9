"""python -m llm.plan RECIPE: what a run needs before it begins. python -m llm.plan --text FILE: recipes for a text."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm.base.command import Parser
from llm.base.errors import RecipeError, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "plan",
        "With a recipe: its parameters, memory, micro-batch, tokens, disk and time, without training. With --text: "
        "recipes for that text, written to this folder, and what to expect of each.",
    )
    parser.add_recipe(nargs="?")
    parser.add_argument(
        "--gpu", metavar="NAME", help="a card of the table, such as 3080ti; default: this machine's CPU"
    )
    parser.add_argument("--memory", metavar="SIZE", help="memory of the card, such as 12GB, instead of the table's")
    parser.add_argument(
        "--probe", action="store_true", help="measure the speed here: train 20 steps in a temporary run"
    )
    parser.add_argument("--text", metavar="FILE", help="propose recipes for this text: a file, or a packaged text")
    parser.add_argument("--hours", help="training time that --text may plan with, such as 8h or 90min")
    ladder_help = "train three tiny models on the text first, for narrower expectations; their time is not in --hours"
    parser.add_argument("--ladder", action="store_true", help=ladder_help)
    given = parser.parse_args(arguments)
    if given.text and given.recipe and "=" in str(given.recipe):
        raise RecipeError(f"{given.recipe}: overrides belong to a recipe; --text takes none")
    if bool(given.recipe) == bool(given.text):
        raise RecipeError("name a recipe, or --text FILE with --hours N")
    if given.text and not given.hours:
        raise RecipeError("--text needs --hours, the training time to plan with, as in --hours 8")
    if not given.text and (given.hours or given.ladder):
        raise RecipeError("--hours and --ladder go with --text, as in --text wiki.txt --gpu 3080ti --hours 8")
    if given.probe and (given.gpu or given.memory):
        raise RecipeError("--probe measures this machine: leave --gpu and --memory out")
    if given.hours:
        from llm.config.reading import value_of

        given.hours = value_of("train.hours", given.hours, said="--hours")
    if given.text and given.probe:
        raise RecipeError("--probe goes with a recipe: propose recipes by --text first, then probe one of them")
    return given


def device(given: argparse.Namespace, threads: int | str) -> Any:
    """The card that the options name, or this machine's CPU. RecipeError for unknown names and sizes."""
    from llm.distributed.threads import threads_per_process
    from llm.insight import cards

    memory = cards.bytes_of(given.memory) if given.memory else 0.0
    if given.gpu:
        card = cards.card(given.gpu)
        return replace(card, memory=memory or card.memory)
    if memory:
        return cards.Device(f"a card of {given.memory}", memory)
    return cards.this_cpu(threads_per_process() if threads == "auto" else int(threads))


def trained(recipe: Any, *, runs: str | Path, on_log: Any, until: int) -> None:
    """As llm.train, which commands lie below; up to the step `until` (-1: the end), where StoppedError ends it."""
    from llm.training.context import Parts
    from llm.training.session import train

    train(recipe, until=until, runs=Path(runs), parts=Parts(on_log=on_log))


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.text:
        from llm.insight import ladder

        on = device(given, "auto")
        law = None
        if given.ladder:  # what cannot be proposed is said before it trains for minutes
            ladder.free_paths(given.text)
            ladder.propose(given.text, on, given.hours)
            law = ladder.climb(given.text, trained, print).law
        for line in ladder.write_proposals(given.text, on, given.hours, law):
            print(line)
        return
    from llm.config.packaged import load_recipe
    from llm.insight import planning

    recipe = load_recipe(given.recipe, given.overrides)
    plan = planning.plan(recipe, on := device(given, recipe.machine.threads))
    if given.probe:
        plan = planning.plan(recipe, on, planning.probe(plan.recipe, trained))
    for line in planning.lines(plan):
        print(line)


if __name__ == "__main__":
    run(main)
