"""Read and write recipes: strict YAML, and overrides such as `train.steps=60`.

YAML gives only a tree of strings; values.py reads each by the type of its key. Nothing in a file can run code.
"""

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
from llm.config.resolving import check_lengths, counted_from_1, resolve
from llm.config.schema import (
    LENGTHS,
    RESERVED_NAMES,
    SOURCE_KEY,
    Recipe,
    Text,
    TextSource,
    all_keys,
    flat,
    section_keys,
    sections,
    source_keys,
    top_keys,
)
from llm.config.values import convert

MAX_BYTES = 1 << 16  # of a recipe file: PyYAML needs a second for the worst one of this size
NULLS = ("", "~", "null", "Null", "NULL")  # where unquoted
SOURCES = "text.sources."
# In format 1, which did not say so in the file, train.skip counted steps from 0; before 3 attention crossed documents.
FORMAT = 3


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` with `overrides` applied, checked and resolved, except for a length in epochs.

    RecipeError if the file or an override is wrong, RefusedError if a run's own recipe was changed.
    """
    given = _read(path)
    if (form := given.pop("format", None) or str(FORMAT)) not in map(str, range(1, FORMAT + 1)):
        raise RecipeError(f"{path} has format = {form!r}: this version reads 1 to {FORMAT}; remove the key")
    if form == "1" and given.get("train.skip"):
        given["train.skip"] = counted_from_1(given["train.skip"])
    if form in ("1", "2"):
        given.setdefault("train.document_mask", "false")
    given.setdefault("run", path.stem)
    if lengths := [name for name in LENGTHS if name in map(key_of, overrides)]:
        check_lengths(lengths)
    for override in overrides:
        _override(given, override)
    recipe = resolve(_build(given))
    if form != "1" and re.fullmatch(RESERVED_NAMES, recipe.run):  # runs of earlier versions may have such a name
        fault = "RUN/best, RUN/newest and RUN/step-N name checkpoints, so a run cannot have this name"
        raise RecipeError(f"run = {recipe.run!r}: {fault}: say run=my-{recipe.run}")
    size = len(with_checksum(dump(recipe)).encode())  # as the run keeps it, and must be able to read it again
    if size > MAX_BYTES:
        raise RecipeError(f"{path} takes {size} bytes when written out, more than {MAX_BYTES}: shorten its lists")
    return recipe


def key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back as an equal recipe."""
    tree: dict[str, Any] = {"format": FORMAT}
    for name, value in flat(recipe).items():
        if value is not None and not (name in LENGTHS and not value):
            *above, leaf = name.split(".")
            below = tree
            for section in above:
                below = below.setdefault(section, {})
            below[leaf] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def with_checksum(text: str) -> str:
    """The text of a recipe followed by a comment with its digest, which `load` verifies."""
    return f"{text}# sha256 of the lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"


class _Dumper(yaml.SafeDumper):
    """Quotes and escapes unprintable text: PyYAML's plain styles lose some line ends."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _override(given: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    name, value = name.strip()[:80], value.strip()  # no key is as long
    if not equals:
        raise RecipeError(f"override {override[:80]!r}: write it as key=value, for example train.steps=60")
    if name in LENGTHS:
        for other in LENGTHS:
            given.pop(other, None)
    if name == "text.files":
        for other in [each for each in given if each.startswith(SOURCES)]:
            del given[other]
    elif name.startswith(SOURCES):
        given.pop("text.files", None)
    if value.startswith("["):
        node = _compose(f"override {name}", value)
        assert node is not None
        given[name] = _value(node, name)
    else:
        given[name] = None if value in NULLS else value


# ---------------------------------------------------------------------------------------------- file to dotted keys


def _read(path: Path) -> dict[str, Any]:
    """The dotted keys of a YAML file, each with a string, a list of strings, or None."""
    data = _bytes(path)
    old = _check_checksum(path, data)
    try:
        root = _compose(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in NULLS):
        raise RecipeError(f"{path} is empty: a recipe needs at least text.files and one of {', '.join(LENGTHS)}")
    given: dict[str, Any] = {"format": "1"} if old else {}
    for name, node in _pairs(root, str(path)):
        section, _, key = name.partition(".")
        if isinstance(node, yaml.MappingNode) and name in sections():
            for key, leaf in _pairs(node, name):
                given.update(_leaves(f"{name}.{key}", leaf))
        elif isinstance(node, yaml.MappingNode) and name not in all_keys():
            raise _unknown(name, [*sections(), *all_keys()])
        elif name in sections() and _value(node, name) is None:
            continue
        elif key and name in all_keys() and not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name}: in a file, write `{key}` under `{section}:`, indented")
        else:
            given[name] = _value(node, name)
    return given


def _leaves(name: str, node: yaml.Node) -> Iterator[tuple[str, Any]]:
    """The dotted key `name` of a section with its value; of text.sources the keys below."""
    if not (name == "text.sources" and isinstance(node, yaml.MappingNode)):
        yield name, _value(node, name)
        return
    for source, keys in _pairs(node, name):
        yield from (
            (f"{name}.{source}.{key}", _value(leaf, f"{name}.{source}.{key}"))
            for key, leaf in _pairs(keys, f"{name}.{source}")
        )


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist: name a recipe, for example recipes/quickstart.yaml") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder: name a recipe file in it") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RecipeError(f"{str(path)[:200]} cannot be read: {reason}; name a recipe file") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES} bytes, too many for a recipe: name a recipe file")
    return data


def _check_checksum(path: Path, data: bytes) -> bool:
    """RefusedError if a recipe that a run keeps was changed. True if it is of format 1."""
    *_, last = data.rstrip(b"\n").rpartition(b"\n")
    # One damaged byte in this line leaves two of its three parts.
    if not (last.startswith(b"# sha2") or re.fullmatch(rb"(#|. sha256 of ).*[0-9a-f]{64}", last)):
        return False
    old = not re.search(rb"(?m)^format:", data)
    if data != with_checksum(data[: -len(last) - 1].decode(errors="replace")).encode():
        raise RefusedError(
            f"{path} is damaged or was edited: it does not match the digest in its last line. If you edited it, "
            f"delete that line{' and write `format: 1` there' if old else ''}"
        )
    return old


def _compose(where: str, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise RecipeError(f"{where}{line} is not YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise RecipeError(f"{where} is nested too deeply: a recipe has sections with keys, not more levels") from None
    except (ValueError, OverflowError):
        raise RecipeError(f"{where} is not YAML: the number in an escape or a directive is out of range") from None


def _pairs(node: yaml.Node, where: str) -> Iterator[tuple[str, yaml.Node]]:
    _check_tag(node, where)
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{where} does not consist of keys: write `key: value` lines")
    seen = set()
    for key, value in node.value:
        _check_tag(key, where)
        line = f"{where}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > 80:
            raise RecipeError(f"{line}: a key must be one word")
        if key.value in seen:
            raise RecipeError(f"{line}: {key.value} appears twice; keep one")
        seen.add(key.value)
        yield key.value, value


def _check_tag(node: yaml.Node, where: str) -> None:
    """Refuse every explicit tag; BaseLoader gives untagged nodes the tag of their form."""
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise RecipeError(f"{where}: the tag {node.tag[:80]!r} is refused: a recipe holds plain values only")


def _value(node: yaml.Node, name: str) -> Any:
    """A string, a list of strings, or None."""
    _check_tag(node, name)
    if isinstance(node, yaml.SequenceNode):
        items = [_value(item, name) if isinstance(item, yaml.ScalarNode) else item for item in node.value]
        if not all(isinstance(item, str) for item in items):
            raise RecipeError(f"{name}: each item of this list must be a single value, not empty and not a list")
        if sum(map(len, items)) > MAX_BYTES:  # of a small file, by YAML's aliases
            raise RecipeError(f"{name} has more than {MAX_BYTES:,} characters: shorten it")
        return items
    if not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{name} takes one value, but has keys under it")
    return None if node.style is None and node.value in NULLS else node.value


# ---------------------------------------------------------------------------------------------- dotted keys to recipe


def _build(given: dict[str, Any]) -> Recipe:
    for name in given:
        if name in sections():
            raise RecipeError(f"{name} is a section: set its keys instead, such as {section_keys(name)[0]}")
        if name.startswith(SOURCES):
            _check_source_key(name)
        elif name not in all_keys():
            raise _unknown(name, all_keys())
    if given.pop("text.sources", None) is not None:
        raise RecipeError("text.sources holds names with keys under them, such as text.sources.wiki.files=wiki.txt")
    if any(name.startswith(SOURCES) for name in given):
        given.setdefault("text.files", [])
    return _section(Recipe, "", given)


def _check_source_key(name: str) -> None:
    match = re.fullmatch(SOURCE_KEY, name)
    if not match:
        rule = "text.sources.NAME.KEY, with a NAME of at most 40 letters (a to z, A to Z), digits, '_' and '-'"
        raise RecipeError(f"{name[:120]!r}: expected {rule}")
    if match[2] not in source_keys():
        near = difflib.get_close_matches(match[2], source_keys(), 1)
        mend = f"did you mean {near[0]}?" if near else f"a source has {', '.join(source_keys())}"
        raise RecipeError(f"{name[:120]} is not a recipe key: {mend}")


def _sources(given: dict[str, Any]) -> tuple[TextSource, ...]:
    """Those of text.sources, by name, so that their order in the file means nothing."""
    names = {match[1] for name in given if (match := re.fullmatch(SOURCE_KEY, name))}
    found = []
    for name in sorted(names):
        prefix = f"{SOURCES}{name}."
        inherited = {f"{prefix}{key}": given.get(f"text.{key}") for key in source_keys() if key != "files"}
        own = {key: value for key, value in given.items() if key.startswith(prefix)}
        own = {key: value for key, value in inherited.items() if value is not None} | own
        kinds, numbers = typing.get_type_hints(TextSource), {}
        for each in fields(TextSource):
            if each.name in ("weight", "epochs") and (value := own.pop(prefix + each.name, None)) is not None:
                numbers[each.name] = convert(prefix + each.name, value, kinds[each.name], each)
        found.append(TextSource(name=name, text=_section(Text, prefix, own), **numbers))
    return tuple(found)


def _section(cls: type, prefix: str, given: dict[str, Any]) -> Any:
    hints, values = typing.get_type_hints(cls), {}
    for each in fields(cls):
        name = prefix + each.name.rstrip("_")
        if is_dataclass(hints[each.name]):
            values[each.name] = _section(hints[each.name], f"{name}.", given)
        elif name == "text.sources":
            values[each.name] = _sources(given)
        elif given.get(name) is not None:
            values[each.name] = convert(name, given[name], hints[each.name], each)
        elif each.default is MISSING:
            raise RecipeError(f"{name} is missing and has no default: set it ({each.metadata['description']})")
        elif name in given and each.default is not None:
            raise RecipeError(f"{name} has no value: give it one, or remove the key to use its default")
    return cls(**values)


def value_of(key: str, text: str, said: str) -> Any:
    """`text` as the value of a recipe's key, for the option `said`, which takes the same."""
    section, _, leaf = key.rpartition(".")
    kind = sections()[section]
    each = next(each for each in fields(kind) if each.name == leaf)
    return convert(said, text, typing.get_type_hints(kind)[leaf], each)


def _unknown(name: str, known: Sequence[str]) -> RecipeError:
    """Suggests a similar dotted key, else the same key of another section, else a similar key of this one."""
    name = name[:80]
    section, _, leaf = name.rpartition(".")
    siblings = section_keys(section) if section in sections() else known
    leaves = {key.rpartition(".")[2]: key for key in reversed(siblings)}
    near = (
        difflib.get_close_matches(name, known, 1, 0.85)
        or [key for key in known if key.endswith(f".{leaf}")]
        or [leaves[each] for each in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    )
    if near:
        return RecipeError(f"{name}: did you mean {near[0]}?")
    if siblings is known:
        return RecipeError(f"{name!r} is not a recipe key: use one of {', '.join([*sections(), *top_keys()])}")
    return RecipeError(f"{name} is not a recipe key: {section} has {', '.join(reversed(leaves))}")
