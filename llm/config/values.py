"""Values of a recipe, from the strings of its YAML file to the types of its fields."""

import difflib
import re
import types
import typing
from dataclasses import Field
from decimal import Decimal, InvalidOperation
from typing import Any

from llm.base.errors import RecipeError
from llm.config.schema import Epochs

SCALES = {"": "1", "k": "1e3", "m": "1e6", "b": "1e9", "g": "1e9", "%": "0.01"}
TIMES = {"s": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1, "d": 24}  # in hours


def convert(name: str, value: Any, kind: Any, each: "Field[Any]") -> Any:
    """`value`, a string or a list of strings, as the type `kind` of field `each`."""
    if re.search("[\0\ud800-\udfff]", "".join(value)):
        raise RecipeError(f"{name} holds a NUL or half a character: it is no text")
    if typing.get_origin(kind) is tuple:
        return tuple(value if isinstance(value, list) else [value])
    if isinstance(value, list):
        raise RecipeError(f"{name} is one value, not a list of {len(value)}")
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    words = [word for option in options for word in typing.get_args(option)]  # those of a Literal
    shown = value if len(value) <= 80 else f"{value[:80]}..."
    if words and value.lower() in words:
        return value.lower()
    if str in options:
        if not value:
            raise RecipeError(f"{name} is empty: give it a value ({each.metadata['unit']})")
        return value
    if bool in options:
        said = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(value.lower())
        if said is None:
            raise RecipeError(f"{name} = {shown!r}: true or false is expected")
        return said
    if Epochs in options and (match := re.fullmatch(r"(.*\S)\s*epochs?", value.strip().lower())):
        constant = _number(name, match[1], whole=False, words=[])
        if not 1e-3 <= constant < 1e6:
            raise RecipeError(f"{name} = {shown}: a time constant of 0.001 to 1,000,000 epochs is expected")
        return Epochs(f"{constant:.12g} epochs")
    if int in options or float in options:
        time = re.fullmatch(r"(.*?) ?([a-z%]+)", value.lower()) if each.metadata["unit"].startswith("hours") else None
        if time and (time[2] not in TIMES or not re.fullmatch(r"[\d.,_e+-]+", time[1])):
            raise RecipeError(f"{name} = {shown!r}: a time is expected, such as 8h, 90min or 2d")
        number = _number(name, time[1] if time else value, whole=int in options, words=words)
        number = number * TIMES[time[2]] if time else number
        least, below = each.metadata["least"], each.metadata["below"]
        if not least <= number < below:
            raise RecipeError(
                f"{name} = {shown}: at least {least:,.10g} and below {below:,.10g} is expected "
                f"({each.metadata['unit']})"
            )
        return number
    if name == "tracking.wandb" and value.lower() in ("false", "no"):
        return "off"
    near = difflib.get_close_matches(value.lower(), words, 1)
    raise RecipeError(
        f"{name} = {shown!r}: one of {', '.join(words)} is expected" + (f"; did you mean {near[0]}?" if near else "")
    )


def _number(name: str, value: str, *, whole: bool, words: list[str]) -> int | float:
    expected = ("a whole number" if whole else "a number") + "".join(f" or {word}" for word in words)
    match = re.fullmatch(
        r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d{1,4})?) ?([kmbg%]?)", value.strip().lower()
    )
    try:
        if match is None or (whole and match[2] == "%"):
            raise InvalidOperation
        number = Decimal(match[1].replace("_", "")) * Decimal(SCALES[match[2]])
    except InvalidOperation:
        raise RecipeError(
            f"{name} = {value[:80]!r}: {expected} is expected, such as {'1000 or 10M' if whole else '0.05, 5% or 1e-3'}"
        ) from None
    if whole and (abs(number) > 10**18 or number != int(number)):
        raise RecipeError(f"{name} = {value[:80]}: {expected} is expected")
    return int(number) if whole else float(number)
