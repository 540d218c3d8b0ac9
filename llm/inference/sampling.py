"""How the next token is chosen: the one place of the defaults, for the command line and for samples in training.

Without torch, so that `--help` and a wrong option are answered at once.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from llm.base.errors import RecipeError


def option(default: float, *, least: float, most: float, help: str) -> Any:
    """A number with the bounds least <= value <= most."""
    return field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclass(frozen=True)
class Sampling:
    """The penalty applies first, then the others in the order in which they stand here.

    RecipeError for a number that is out of bounds, NaN among them.
    """

    temperature: float = option(0.8, least=0, most=1e6, help="0: always the likeliest token; 1: as the model says")
    top_k: int = option(0, least=0, most=float("inf"), help="choose among this many likeliest tokens; 0: all")
    top_p: float = option(1.0, least=1e-9, most=1, help="among the likeliest that hold this probability together")
    min_p: float = option(0.05, least=0, most=1, help="among those with this share of the likeliest one's probability")
    repetition_penalty: float = option(
        1.0, least=1e-6, most=1e6, help="above 1: tokens that occurred become less likely, their logits divided by it"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least, most = getattr(self, each.name), each.metadata["least"], each.metadata["most"]
            if not least <= value <= most:
                rule = f"at least {least:g}" + (f" and at most {most:,.10g}" if most < float("inf") else "")
                raise RecipeError(f"{flag(each)} = {value}: {rule} is expected")


def flag(each: "Field[Any]") -> str:
    """The field as an option of the command line."""
    return f"--{each.name.replace('_', '-')}"
