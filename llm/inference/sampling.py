"""Sampling options and their defaults, for the command line and for samples during training.

Does not import torch, so that `--help` and errors in options are instant.
"""

from argparse import Namespace
from dataclasses import Field, dataclass, field, fields
from typing import Any

from llm.base.command import Parser, checked

INT8 = "on a CPU: weights of 8 bits, faster from some 10 M parameters on; `evaluate --int8` says what that costs"


def option(default: float, *, least: float, most: float, help: str) -> Any:
    """A number with least <= value <= most."""
    return field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclass(frozen=True)
class Sampling:
    """Options of `generation.choose`, which applies the penalty first and then the others in this order.

    RecipeError if a number is out of bounds or NaN.
    """

    temperature: float = option(0.8, least=0, most=1e6, help="0: always the likeliest token; 1: as the model says")
    top_k: int = option(0, least=0, most=float("inf"), help="choose among this many likeliest tokens; 0: all")
    top_p: float = option(1.0, least=1e-9, most=1, help="among the likeliest that hold this probability together")
    min_p: float = option(0.05, least=0, most=1, help="among those with this share of the likeliest one's probability")
    # A small model goes round in circles without: recipes/experiments.md, "quickstart", has the figures.
    repetition_penalty: float = option(
        1.1, least=1e-6, most=1e6, help="above 1: tokens that occurred become less likely, their logits divided by it"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            bounds = each.metadata["least"], each.metadata["most"]
            value = checked(each.name, str(getattr(self, each.name)), type(each.default), *bounds)
            object.__setattr__(self, each.name, value)


def add_sampling(parser: Parser) -> None:
    """Add a command-line option for each field of Sampling."""
    for each in fields(Sampling):
        default: Any = each.default
        bounds = {name: each.metadata[name] for name in ("least", "most")}
        help = f"{each.metadata['help']} (default {default:g})"
        parser.add_number(flag(each), kind=type(default), default=default, help=help, **bounds)


def sampling_of(given: Namespace) -> Sampling:
    """The Sampling of the options that `add_sampling` added."""
    return Sampling(**{each.name: getattr(given, each.name) for each in fields(Sampling)})


def flag(each: "Field[Any]") -> str:
    """The field's command-line option."""
    return f"--{each.name.replace('_', '-')}"
