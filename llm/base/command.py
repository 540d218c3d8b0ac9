"""The command-line parser that all commands share. It never imports torch, so that `--help` answers at once."""

import argparse
import sys
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from llm.base.errors import RecipeError

NAMED = "name of a run under runs/, or its folder"
RECIPE_HELP = "a recipe, such as recipes/quickstart.yaml, or the name of a packaged one, such as quickstart"
OVERRIDES_HELP = "keys of the recipe to override, such as train.steps=60"
RUN_HELP = "name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
MEAN_HELP = "average the weights of RUN and of this run, which must have started from the same checkpoint; repeatable"


class Parser(argparse.ArgumentParser):
    """An argparse parser for `python -m llm.NAME`."""

    def __init__(self, name: str, description: str, **options: Any) -> None:
        super().__init__(**{"prog": f"python -m llm.{name}", "description": description, **options})

    def error(self, message: str) -> NoReturn:
        """RecipeError instead of argparse's several lines."""
        raise RecipeError(f"{message}: `{self.prog} --help` tells what it takes")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but options and overrides may stand in any order; behind -- stand names of files."""
        given = list(sys.argv[1:] if args is None else args)
        if "--" in given:  # which parse_intermixed_args does not keep
            at = given.index("--")
            given[at:] = [f"./{each}" if each.startswith("-") else each for each in given[at + 1 :]]
        return self.parse_intermixed_args(given, namespace)

    def add_run(self) -> None:
        """Add the optional positional argument RUN."""
        self.add_argument("run", nargs="?", help=RUN_HELP)

    def add_recipe(self, **options: Any) -> None:
        """Add the positional arguments RECIPE and key=value ..."""
        self.add_argument("recipe", type=Path, help=RECIPE_HELP, **options)
        self.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP)

    def add_number(self, flag: str, *, least: float = 0, most: float = inf, kind: type = int, **options: Any) -> None:
        """Add an option that takes a number of `kind` with least <= value <= most; RecipeError names the rule."""
        self.add_argument(flag, type=partial(checked, flag, kind=kind, least=least, most=most), **options)


def as_text(argument: str) -> str:
    """An argument as the text that was typed: in another encoding than the locale's it arrives as surrogates."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def checked(flag: str, text: str, kind: type, least: float, most: float) -> Any:
    """`text` as a number within its bounds. NaN is outside of any bounds."""
    try:
        value = kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RecipeError(f"{flag} = {text[:40]!r}: expected {expected}") from None
    if not least <= value <= most:
        upper = f"{most:,}" if isinstance(most, int) else f"{most:,.10g}"
        rule = f"at least {least:g}" + (f" and at most {upper}" if most < inf else "")
        raise RecipeError(f"{flag} = {text[:40]}: must be {rule}")
    return value
