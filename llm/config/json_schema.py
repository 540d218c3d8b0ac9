"""JSON schema of a recipe, by which editors complete and check its keys.

`python -m llm.config.json_schema > recipes/schema.json` writes it again after a change to schema.py.
"""

import json
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from llm.config.reading import FORMAT
from llm.config.schema import LENGTHS, Epochs, Recipe, Text, TextSource, Train, source_keys
from llm.config.values import TIMES, TRUTH, options_of

SCALAR = ["string", "number", "boolean"]  # YAML reads the string 2024 as a number and no as a boolean
# values.NUMBER in ECMA's dialect.
DIGITS = r"^ *[+-]?([0-9][0-9_]*[.]?[0-9_]*|[.][0-9][0-9_]*)([eE][+-]?[0-9]{1,4})?"

ONE_OF = {Train: [name.split(".")[1] for name in LENGTHS], Text: ["files", "sources"]}


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file. Editors cannot check what needs two keys, which `load` does."""
    schema = _section(Recipe)
    versions = [value for number in range(1, FORMAT + 1) for value in (number, str(number))]
    schema["properties"]["format"] = {"description": "version of the recipe's format", "enum": versions}
    schema["required"].remove("run")  # the file's name by default
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Recipe", **schema}


def _section(cls: type) -> dict[str, Any]:
    hints, keys = typing.get_type_hints(cls), fields(cls)
    nested = {each.name: _section(hints[each.name]) for each in keys if is_dataclass(hints[each.name])}
    if cls is Text:
        nested["sources"] = _sources()
    required = [each.name for each in keys if each.default is each.default_factory is MISSING]
    return {
        "type": "object" if required or cls is Train else ["object", "null"],
        "properties": {each.name.rstrip("_"): nested.get(each.name) or _key(hints[each.name], each) for each in keys},
        "required": required if cls is not Text else [],
        "additionalProperties": False,
        **({"oneOf": [{"required": [name]} for name in ONE_OF[cls]]} if cls in ONE_OF else {}),
    }


def _sources() -> dict[str, Any]:
    """Of text.sources: keys of `text` with weight and epochs, under names."""
    hints = {**typing.get_type_hints(Text), **typing.get_type_hints(TextSource)}
    keys = {each.name: each for each in (*fields(TextSource), *fields(Text))}
    source = {
        "type": "object",
        "properties": {name: _key(hints[name], keys[name]) for name in source_keys()},
        "required": ["files"],
        "anyOf": [{"required": ["weight"]}, {"required": ["epochs"]}],
        "additionalProperties": False,
    }
    about = next(each for each in fields(Text) if each.name == "sources").metadata["description"]
    names = {"^[A-Za-z0-9_-]{1,40}$": source}
    only = {"minProperties": 1, "additionalProperties": False}
    return {"description": about, "type": "object", "patternProperties": names, **only}


def _key(kind: Any, each: "Field[Any]") -> dict[str, Any]:
    about = each.metadata
    default = list(each.default) if isinstance(each.default, tuple) else each.default
    alternatives = list(_alternatives(kind, about))
    return {
        "description": about["description"],
        **({} if default is MISSING else {"default": default}),
        **(alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}),
    }


def _alternatives(kind: Any, about: Any) -> typing.Iterator[dict[str, Any]]:
    options, words = options_of(kind)
    if typing.get_origin(kind) is tuple:
        yield from ({"type": "array", "items": {"type": SCALAR}}, {"type": SCALAR})
        return
    if words:
        yield {"enum": [*words, *([False] if "off" in words else [])]}  # YAML 1.1 reads off as false
    if str in options:
        yield {"type": [*SCALAR, "null"] if type(None) in options else SCALAR}
    elif bool in options:
        yield {"enum": [True, False, *TRUTH]}
    elif int in options or float in options:
        whole = int in options
        hours = about["description"].startswith("hours")
        suffix = "|".join([*TIMES, *map(str.upper, TIMES)]) if hours else "[kKmMbBgG]" if whole else "[kKmMbBgG%]"
        names = {"least": "minimum", "below": "exclusiveMaximum", "most": "maximum"}
        bounds = {names[key]: bound for key, bound in about.items() if key in names}
        yield {"type": "integer" if whole else "number", **bounds}
        yield {"type": "string", "pattern": f"{DIGITS} ?({suffix})? *$"}
    if Epochs in options:
        yield {"type": "string", "pattern": f"{DIGITS} *[eE]pochs? *$"}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
