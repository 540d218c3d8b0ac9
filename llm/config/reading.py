"""Reading and writing recipes: strict YAML with overrides."""

import difflib
import hashlib
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from llm.base.errors import RecipeError, RefusedError
from llm.config.resolving import counted_from_1, resolve
from llm.config.schema import LENGTHS, TAKEN, Recipe, flat, keys, keys_of, sections, single_keys
from llm.config.values import convert

MOST_BYTES = 1 << 16  # of a recipe file: PyYAML needs a second for the worst of that size
NOTHING = ("", "~", "null", "Null", "NULL")  # unquoted, no value
FORMAT = 2  # of a recipe; in format 1, which runs kept without saying so, train.skip counted steps from 0


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in `path` with overrides such as `train.steps=60`, checked and resolved but for a length in epochs.

    RecipeError for what cannot be meant, before anything is built.
    """
    given = _read(path)
    if (form := given.pop("format", None) or str(FORMAT)) not in ("1", str(FORMAT)):
        raise RecipeError(f"{path} has format = {form!r}: this version reads 1 and {FORMAT}; leave the key out")
    if form == "1" and given.get("train.skip"):
        given["train.skip"] = counted_from_1(given["train.skip"])
    given.setdefault("run", path.stem)
    for override in overrides:
        name, equals, value = override.partition("=")
        name = name.strip()
        if not equals:
            raise RecipeError(f"override {override!r}: write it as key=value, for example train.steps=60")
        if name in LENGTHS:
            for other in LENGTHS:
                given.pop(other, None)
        given[name] = _flow(name, value.strip())
    recipe = resolve(_build(given))
    if form != "1" and re.fullmatch(TAKEN, recipe.run):  # earlier versions trained such runs: theirs are read
        raise RecipeError(
            f"run = {recipe.run!r}: RUN/best, RUN/newest and RUN/step-N name checkpoints, so no run can have such a "
            f"name: say run=my-{recipe.run}"
        )
    if (
        size := len(with_checksum(dump(recipe)).encode())
    ) > MOST_BYTES:  # the run keeps it, and must be able to read it again
        raise RecipeError(f"{path} has {size} bytes when it is written out, {MOST_BYTES} at most: shorten its lists")
    return recipe


def _read(path: Path) -> dict[str, Any]:
    """Dotted keys of the YAML file, each with a string, a list of strings, or None."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path} is not there: name a recipe, for example recipes/quickstart.yaml") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder: name a recipe file in it") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RecipeError(f"{str(path)[:200]} cannot be read: {reason}; name a recipe file") from None
    if len(data) > MOST_BYTES:
        raise RecipeError(f"{path} has more than {MOST_BYTES} bytes: that is no recipe")
    *_, last = data.rstrip(b"\n").rpartition(b"\n")
    kept = last.startswith(b"# sha2") or re.fullmatch(rb"#.*[0-9a-f]{64}", last)  # by a run
    old = kept and not re.search(rb"(?m)^format:", data)
    if kept and data != with_checksum(data[: -len(last) - 1].decode(errors="replace")).encode():
        raise RefusedError(
            f"{path} is damaged, or was edited: it does not match the digest in its last line. Where you edited it, "
            f"take that line out{' and put `format: 1` there' if old else ''}"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    root = _compose(str(path), text)
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in NOTHING):
        raise RecipeError(f"{path} is empty: a recipe needs at least text.files and one of {', '.join(LENGTHS)}")
    given: dict[str, Any] = {"format": "1"} if old else {}
    for name, node in _pairs(root, str(path)):
        if isinstance(node, yaml.MappingNode):
            if name not in sections():
                raise (
                    _unknown(name, [*sections(), *keys()])
                    if name not in keys()
                    else RecipeError(f"{name} has keys under it, but is one value")
                )
            given.update({f"{name}.{key}": _value(leaf, f"{name}.{key}") for key, leaf in _pairs(node, name)})
        elif name in sections() and _value(node, name) is None:
            continue
        elif "." in name and name in keys():
            section, _, key = name.partition(".")
            raise RecipeError(f"{name}: in a file, write `{key}` under `{section}:`, indented")
        else:
            given[name] = _value(node, name)
    return given


def _compose(where: str, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(
            f"{where}{line} is not YAML: {' '.join(str(error.problem or error.context).split())}"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise RecipeError(f"{where} is nested too deeply: a recipe has keys and keys under them, no more") from None
    except (ValueError, OverflowError):
        raise RecipeError(f"{where} is not YAML: the number in an escape or a directive is out of range") from None


def _pairs(node: yaml.Node, where: str) -> Iterator[tuple[str, yaml.Node]]:
    _check_tag(node, where)
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{where} is not a list of keys: write `key: value` lines")
    seen = set()
    for key, value in node.value:
        _check_tag(key, where)
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > 80:
            raise RecipeError(f"{where}, line {key.start_mark.line + 1}: a key is one word")
        if key.value in seen:
            raise RecipeError(f"{where}, line {key.start_mark.line + 1}: {key.value} stands there twice; keep one")
        seen.add(key.value)
        yield key.value, value


def _check_tag(node: yaml.Node, where: str) -> None:
    """Refuse every tag: BaseLoader gives a node that has none of its own the tag of its form."""
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise RecipeError(f"{where}: the tag {node.tag[:80]!r} is refused: a recipe holds plain values only")


def _value(node: yaml.Node, name: str) -> Any:
    """String, list of strings, or None."""
    _check_tag(node, name)
    if isinstance(node, yaml.SequenceNode):
        items = [_value(item, name) if isinstance(item, yaml.ScalarNode) else item for item in node.value]
        if not all(isinstance(item, str) for item in items):
            raise RecipeError(f"{name}: a list here holds single values, none of them empty or a list")
        return items
    if not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{name} has keys under it, but is one value")
    return None if node.style is None and node.value in NOTHING else node.value


def _flow(name: str, value: str) -> Any:
    """The value of an override: a list where it is written as one, else the very string."""
    if value.startswith("["):
        node = _compose(f"override {name}", value)
        assert node is not None
        return _value(node, name)
    return None if value in NOTHING else value


def _build(given: dict[str, Any]) -> Recipe:
    for name in given:
        if name in sections():
            raise RecipeError(f"{name} is a section: give its keys their values, such as {keys_of(name)[0]}")
        if name not in keys():
            raise _unknown(name, keys())

    def section(cls: type, prefix: str) -> Any:
        hints, values = typing.get_type_hints(cls), {}
        for each in fields(cls):
            name = prefix + each.name.rstrip("_")
            if is_dataclass(hints[each.name]):
                values[each.name] = section(hints[each.name], f"{name}.")
            elif given.get(name) is not None:
                values[each.name] = convert(name, given[name], hints[each.name], each)
            elif each.default is MISSING:
                raise RecipeError(f"{name} is missing: it has no default ({each.metadata['unit']})")
            elif name in given and each.default is not None:
                raise RecipeError(f"{name} has no value: give it one, or leave it out for its default")
        return cls(**values)

    return section(Recipe, "")


def _unknown(name: str, known: Sequence[str]) -> RecipeError:
    """Names the key that was meant: near as a whole, of the same name in another section, or near beside it."""
    name = name[:80]
    section, _, leaf = name.rpartition(".")
    beside = keys_of(section) if section in sections() else known
    leaves = {key.rpartition(".")[2]: key for key in reversed(beside)}
    near = (
        difflib.get_close_matches(name, known, 1, 0.85)
        or [key for key in known if key.endswith(f".{leaf}")]
        or [leaves[each] for each in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    )
    if near:
        return RecipeError(f"{name}: did you mean {near[0]}?")
    if beside is known:
        return RecipeError(f"{name!r} is no key of a recipe: they are {', '.join([*sections(), *single_keys()])}")
    return RecipeError(f"{name} is no key of a recipe: {section} has {', '.join(leaf for leaf in reversed(leaves))}")


class _Dumper(yaml.SafeDumper):
    """Quotes and escapes whatever is not printable, since PyYAML's plain styles do not give every line end back."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def with_checksum(text: str) -> str:
    """The text of a recipe and, as a comment, its digest, which is held against it when it is read."""
    return f"{text}# sha256 of the lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads to the same recipe."""
    tree: dict[str, Any] = {"format": FORMAT}
    for name, value in flat(recipe).items():
        if value is not None and not (name in LENGTHS and not value):
            *above, leaf = name.split(".")
            (tree.setdefault(above[0], {}) if above else tree)[leaf] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
