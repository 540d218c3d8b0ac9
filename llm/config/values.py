"""Convert a recipe's strings to the types of its fields, so that `1e-3`, `10M`, `5%` and `no` mean what they say."""

import difflib
import re
import types
import typing
from dataclasses import Field
from decimal import Decimal, InvalidOperation
from math import inf
from typing import Any

from llm.base.errors import RecipeError
from llm.config.schema import Epochs

SCALES = {"": "1", "k": "1e3", "m": "1e6", "b": "1e9", "g": "1e9", "%": "0.01"}
TIMES = {"s": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1, "d": 24}  # in hours
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TIME = "expected a time such as 8h, 90min or 2d"
NUMBER = r"[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d{1,4})?"


def options_of(kind: Any) -> tuple[tuple[Any, ...], list[str]]:
    """The alternatives of a type, and the words of the literals among them."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return options, [word for option in options for word in typing.get_args(option)]


def convert(name: str, value: str | list[str], kind: Any, each: "Field[Any]") -> Any:
    """`value` as the type `kind` of the field `each`, which is the key `name`."""
    if re.search("[\0\ud800-\udfff]", "".join(value)):
        raise RecipeError(f"{name} contains a NUL or half a character: write plain text")
    if typing.get_origin(kind) is tuple:
        return tuple(value if isinstance(value, list) else [value])
    if isinstance(value, list):
        raise RecipeError(f"{name} takes one value, not a list of {len(value)}")
    options, words = options_of(kind)
    if words and value.lower() in words:
        return value.lower()
    if str in options:
        if not value:
            raise RecipeError(f"{name} is empty: give it a value ({each.metadata['description']})")
        return value
    if bool in options:
        if value.lower() not in TRUTH:
            others = "".join(f" or {word}" for word in words)
            raise RecipeError(f"{name} = {_short(value)!r}: expected true or false{others}")
        return TRUTH[value.lower()]
    if Epochs in options and (match := re.fullmatch(r"(.*\S)\s*epochs?", value.strip().lower())):
        return _epochs(name, value, match[1])
    if int in options or float in options:
        return _bounded(name, value, whole=int in options, words=words, each=each)
    if "off" in words and TRUTH.get(value.lower()) is False:
        return "off"
    near = difflib.get_close_matches(value.lower(), words, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(f"{name} = {_short(value)!r}: expected one of {', '.join(words)}{meant}")


def _short(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:80]}..."


def _epochs(name: str, value: str, number: str) -> Epochs:
    constant = _number(name, number, whole=False, words=[])
    if not 1e-3 <= constant < 1e6:
        raise RecipeError(f"{name} = {_short(value)}: expected a time constant of 0.001 to 1,000,000 epochs")
    return Epochs(f"{constant:.12g} epochs")


def _bounded(name: str, value: str, *, whole: bool, words: list[str], each: "Field[Any]") -> int | float:
    """A number or a time, in hours, within the field's bounds."""
    described, least, below = each.metadata["description"], each.metadata["least"], each.metadata.get("below", inf)
    most = each.metadata.get("most", inf)
    time = re.fullmatch(r"(.*?) ?([a-z%]+)", value.lower()) if described.startswith("hours") else None
    if time and (time[2] not in TIMES or not re.fullmatch(r"[\d.,_e+-]+", time[1])):
        raise RecipeError(f"{name} = {_short(value)!r}: {TIME}")
    try:
        number = _number(name, time[1] if time else value, whole=whole, words=words)
    except RecipeError:
        if not described.startswith("hours"):
            raise
        raise RecipeError(f"{name} = {_short(value)!r}: {TIME}") from None
    number = number * TIMES[time[2]] if time else number
    if not least <= number < below or number > most:
        upper = f"below {below:,.10g}" if below < inf else f"at most {most:,.10g}"
        rule = f"must be at least {least:,.10g} and {upper}"
        raise RecipeError(f"{name} = {_short(value)}: {rule} ({described})")
    return number


def _number(name: str, value: str, *, whole: bool, words: list[str]) -> int | float:
    expected = ("a whole number" if whole else "a number") + "".join(f" or {word}" for word in words)
    match = re.fullmatch(f"({NUMBER}) ?([kmbg%]?)", value.strip().lower())
    try:
        if match is None or (whole and match[2] == "%"):
            raise InvalidOperation
        number = Decimal(match[1].replace("_", "")) * Decimal(SCALES[match[2]])
    except InvalidOperation:
        examples = "1000 or 10M" if whole else "0.05, 5% or 1e-3"
        raise RecipeError(f"{name} = {value[:80]!r}: expected {expected}, such as {examples}") from None
    if whole and (abs(number) > 10**18 or number != int(number)):
        limit = " of at most 1e18" if abs(number) > 10**18 else ""
        raise RecipeError(f"{name} = {value[:80]}: expected {expected}{limit}")
    return int(number) if whole else float(number)
