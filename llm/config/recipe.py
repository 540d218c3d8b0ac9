"""A recipe: one YAML file that says all of one run, read strictly. Every key belongs to one of two halves.

Science decides the loss curve, machine only how fast and where (and `run` only where the result lies). YAML gives
nothing but the tree of strings: each value is read by the type of its field, so that `1e-3`, `10M`, `5%` and `no` mean
what a person means by them.
"""

import difflib
import hashlib
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from llm.base.errors import RecipeError, RefusedError

Auto: TypeAlias = Literal["auto"]
Epochs = typing.NewType("Epochs", str)  # such as "0.7 epochs": a time constant, counted in passes over the text
MOST_BYTES = 1 << 16  # of a recipe file: PyYAML needs a second for the worst of that size
LEAST_VOCABULARY = 264  # every byte, the pieces without text, and some room
NOTHING = ("", "~", "null", "Null", "NULL")  # unquoted, no value
SCALES = {"": "1", "k": "1e3", "m": "1e6", "b": "1e9", "g": "1e9", "%": "0.01"}
TIMES = {"s": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1, "d": 24}  # in hours


def setting(default: Any = MISSING, *, unit: str, least: float | None = None, below: float | None = None) -> Any:
    """A key of the recipe: its unit, and the bounds least <= value < below of a number."""
    return field(default=default, metadata={"unit": unit, "least": least, "below": below})


@dataclass(frozen=True, kw_only=True)
class Text:
    files: tuple[str, ...] = setting(unit="paths, globs, or named texts such as wiki-leads")
    documents: str = setting("auto", unit="auto, headings, blank-lines, blocks, lines, files, or: marker LINE")
    validation: float = setting(0.05, unit="share of the documents that is held out", least=0, below=1)
    field: str = setting("text", unit="the field of a .jsonl line that holds the text")
    cache: str | None = setting(None, unit="folder of prepared text; data/ where none is named")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    vocabulary: int = setting(4096, unit="pieces", least=LEAST_VOCABULARY, below=1 << 24)
    terms: tuple[str, ...] = setting((), unit="words that stay whole")
    path: str | None = setting(None, unit="an existing sentencepiece .model, used instead of training one")


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = setting(256, unit="features", least=1, below=1 << 20)
    layers: int = setting(6, unit="blocks", least=1, below=1 << 12)
    heads: int = setting(4, unit="query heads", least=1, below=1 << 12)
    kv_heads: int = setting(0, unit="key and value heads; 0: as many as heads", least=0, below=1 << 12)
    head_dim: int = setting(0, unit="features a head; 0: dim / heads", least=0, below=1 << 20)
    ffn_dim: int = setting(
        0, unit="features inside the MLP; 0: 8/3 dim, up to a multiple of 64", least=0, below=1 << 22
    )
    context: int = setting(512, unit="tokens", least=2, below=1 << 20)
    dropout: float | Auto = setting(0.0, unit="share of the features; auto: by the number of epochs", least=0, below=1)
    tied: bool = setting(True, unit="input and output embeddings are one matrix")
    from_: str | None = setting(None, unit="folder of a Qwen3 or Llama model, whose weights and tokenizer are taken")


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = setting(0, unit="optimizer updates", least=1, below=1e15)
    tokens: int = setting(0, unit="target tokens", least=1, below=1e15)
    epochs: float = setting(0.0, unit="passes over the training side", least=1e-6, below=1e6)
    hours: float = setting(0.0, unit="hours of training, such as 8h or 90min", least=1e-4, below=1e5)
    tokens_per_step: int = setting(8192, unit="tokens", least=1, below=1e10)
    optimizer: Literal["muon", "adamw"] = setting(
        "muon", unit="muon: Muon for the blocks' matrices, AdamW for the rest"
    )
    learning_rate: float = setting(0.02, unit="of Muon's matrices, or of AdamW", least=0, below=10)
    warmup: int = setting(0, unit="steps from zero to the full rate", least=0, below=1e12)
    decay: float = setting(
        0.4, unit="share of the run, at its end, in which the rate falls to zero", least=0, below=1.0001
    )
    weight_decay: float | Epochs | Auto = setting(
        0.1, unit="a step, times the rate; or over how many epochs weights forget, as 0.7 epochs", least=0, below=100
    )
    clip: float = setting(1.0, unit="largest norm of the gradient; 0: none", least=0, below=1e9)
    skip: tuple[str, ...] = setting((), unit="ranges of steps, such as 1200-1210, whose windows are left out")
    on_nonfinite: Literal["stop", "skip"] = setting("stop", unit="what a loss or gradient that is not finite does")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    every: int = setting(500, unit="steps", least=1, below=1e12)
    prompts: tuple[str, ...] = setting(
        (), unit="texts to go on with after each evaluation; auto: how a document of the text begins"
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = setting(500, unit="steps", least=1, below=1e12)
    keep: int = setting(2, unit="newest checkpoints kept, beside the best", least=1, below=1e6)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    every: int = setting(10, unit="steps", least=1, below=1e12)
    wandb: Literal["off", "offline", "online"] = setting("off", unit="online needs a key; offline where there is none")
    tensorboard: bool = setting(False, unit="needs the package tensorboard")


@dataclass(frozen=True, kw_only=True)
class Machine:
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", unit="auto: what the device multiplies fast")
    micro_batch: int | Auto = setting("auto", unit="windows a process runs at once", least=1, below=1e9)
    stop_after: float = setting(
        0.0, unit="hours, such as 8h, after which the run saves and stops; 0: never", least=0, below=1e6
    )
    threads: int | Auto = setting("auto", unit="CPU threads a process", least=1, below=4096)
    shard: Literal["none", "full", "hybrid"] = setting(
        "none", unit="none, full: among all processes, hybrid: in a node"
    )
    exact: bool = setting(False, unit="the same bits on 1, 2, 4 ... processes, for more memory and exchange")
    recompute: bool = setting(
        False, unit="forget each block's activations and compute them again: less memory, a third slower"
    )
    compile: bool = setting(
        False, unit="compile each block, on a GPU the loss too; pays on long runs, needs a C++ compiler or Triton"
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `from_` is the key `from`, here and under `model`."""

    run: str = setting(unit="name of the folder under runs/")
    seed: int = setting(1, unit="any whole number", least=0, below=1 << 32)
    from_: str | None = setting(None, unit="RUN/step-N: start from that checkpoint")
    text: Text
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    train: Train
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    machine: Machine = field(default_factory=Machine)

    @property
    def windows_per_step(self) -> int:
        return self.train.tokens_per_step // self.model.context

    @property
    def from_step(self) -> int:
        """Updates that are done before the run's first one."""
        return int(self.from_.rpartition("-")[2]) if self.from_ else 0


# Which keys cannot change the curve. Where the text lies is of this half too: its content has a fingerprint of its own.
MACHINE_HALF = (
    "run",
    "text.files",
    "text.cache",
    "tokenizer.path",
    "evaluate.",
    "checkpoint.",
    "tracking.",
    "machine.",
)
NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # of a run: never a way out of runs/
STEP = "step-([0-9]{1,15})"  # a checkpoint's folder
TAKEN = "best|newest|checkpoints|step-.*"  # what stands behind RUN/ for its checkpoints: no run's name
FORMAT = 2  # of a recipe; in format 1, which runs kept without saying so, train.skip counted steps from 0
MANY_EPOCHS, MANY_EPOCHS_DROPOUT = 8, 0.1  # what dropout = auto comes to where the text is read more often than this
FORGOTTEN_AFTER = 0.7  # epochs: the time constant of weight_decay = auto
MOST_DECAY = 3.2  # that a time constant may ask for
AUTO_PROMPTS = ("auto",)
LENGTHS = ("train.steps", "train.tokens", "train.epochs", "train.hours")  # a recipe names exactly one


# ---------------------------------------------------------------------------------------------- reading


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
            if name not in _sections():
                raise (
                    _unknown(name, [*_sections(), *_keys()])
                    if name not in _keys()
                    else RecipeError(f"{name} has keys under it, but is one value")
                )
            given.update({f"{name}.{key}": _value(leaf, f"{name}.{key}") for key, leaf in _pairs(node, name)})
        elif name in _sections() and _value(node, name) is None:
            continue
        elif "." in name and name in _keys():
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
        if name in _sections():
            raise RecipeError(f"{name} is a section: give its keys their values, such as {_keys_of(name)[0]}")
        if name not in _keys():
            raise _unknown(name, _keys())

    def section(cls: type, prefix: str) -> Any:
        hints, values = typing.get_type_hints(cls), {}
        for each in fields(cls):
            name = prefix + each.name.rstrip("_")
            if is_dataclass(hints[each.name]):
                values[each.name] = section(hints[each.name], f"{name}.")
            elif given.get(name) is not None:
                values[each.name] = _convert(name, given[name], hints[each.name], each)
            elif each.default is MISSING:
                raise RecipeError(f"{name} is missing: it has no default ({each.metadata['unit']})")
            elif name in given and each.default is not None:
                raise RecipeError(f"{name} has no value: give it one, or leave it out for its default")
        return cls(**values)

    return section(Recipe, "")


def _convert(name: str, value: Any, kind: Any, each: "Field[Any]") -> Any:
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


@cache
def _sections() -> tuple[str, ...]:
    return tuple(name for name, kind in typing.get_type_hints(Recipe).items() if is_dataclass(kind))


@cache
def _keys_of(section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{each.name.rstrip('_')}" for each in fields(typing.get_type_hints(Recipe)[section]))


@cache
def _keys() -> tuple[str, ...]:
    """Every key of a recipe, dotted."""
    return _single_keys() + tuple(key for section in _sections() for key in _keys_of(section))


def _single_keys() -> tuple[str, ...]:
    return tuple(each.name.rstrip("_") for each in fields(Recipe) if each.name not in _sections())


def _unknown(name: str, known: Sequence[str]) -> RecipeError:
    """Names the key that was meant: near as a whole, of the same name in another section, or near beside it."""
    name = name[:80]
    section, _, leaf = name.rpartition(".")
    beside = _keys_of(section) if section in _sections() else known
    leaves = {key.rpartition(".")[2]: key for key in reversed(beside)}
    near = (
        difflib.get_close_matches(name, known, 1, 0.85)
        or [key for key in known if key.endswith(f".{leaf}")]
        or [leaves[each] for each in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    )
    if near:
        return RecipeError(f"{name}: did you mean {near[0]}?")
    if beside is known:
        return RecipeError(f"{name!r} is no key of a recipe: they are {', '.join([*_sections(), *_single_keys()])}")
    return RecipeError(f"{name} is no key of a recipe: {section} has {', '.join(leaf for leaf in reversed(leaves))}")


# ---------------------------------------------------------------------------------------------- meaning


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what follows from other keys and refuse what cannot be together.

    A length in epochs stays, as it needs the text.
    """
    model, train = recipe.model, recipe.train
    if not re.fullmatch(NAME, recipe.run):
        raise RecipeError(
            f"run = {recipe.run[:120]!r}: at most 100 of a to z, A to Z, 0 to 9, '_', '.' and '-' are expected, the "
            f"last two not first, as it names a folder under runs/: say run=NAME"
        )
    if recipe.from_ is not None and not re.fullmatch(f"{NAME}/{STEP}", recipe.from_):
        raise RecipeError(f"from = {recipe.from_[:120]!r}: RUN/step-N is expected, such as quickstart/step-000400")
    if not recipe.text.files:
        raise RecipeError("text.files is empty: name at least one text")
    if any(not term or "\n" in term for term in recipe.tokenizer.terms):
        raise RecipeError("tokenizer.terms: a term is a word or some words on one line, not empty")
    if model.from_ is not None and (recipe.tokenizer.path or recipe.tokenizer.terms):
        raise RecipeError("model.from takes its tokenizer along: leave tokenizer.path and tokenizer.terms out")
    recipe = replace(recipe, from_=checkpoint_name(recipe.from_))
    lengths = [name for name in LENGTHS if getattr(train, name.split(".")[1])]
    if len(lengths) != 1:
        raise RecipeError(
            f"{' and '.join(lengths) or 'no length'} given: a run has exactly one of {', '.join(LENGTHS)}"
        )
    if not model.head_dim and model.dim % model.heads:
        raise RecipeError(
            f"model.dim = {model.dim} cannot be split into model.heads = {model.heads}: set model.head_dim, "
            f"for example {max(2, model.dim // model.heads // 2 * 2)}"
        )
    head_dim = model.head_dim or model.dim // model.heads
    if head_dim % 2:
        raise RecipeError(
            f"model.head_dim = {head_dim}: rotary positions need an even number, for example {head_dim + 1}"
        )
    kv_heads = model.kv_heads or model.heads
    if model.heads % kv_heads:
        fitting = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        raise RecipeError(
            f"model.kv_heads = {kv_heads} does not divide model.heads = {model.heads}: one of {fitting} does"
        )
    if train.tokens_per_step % model.context:
        near = max(1, round(train.tokens_per_step / model.context)) * model.context
        raise RecipeError(
            f"train.tokens_per_step = {train.tokens_per_step} is no multiple of model.context = {model.context}: "
            f"try {near}"
        )
    windows = train.tokens_per_step // model.context
    if isinstance(recipe.machine.micro_batch, int) and windows % recipe.machine.micro_batch:
        divisors = {d for n in range(1, math.isqrt(windows) + 1) if windows % n == 0 for d in (n, windows // n)}
        near = max(divisor for divisor in divisors if divisor <= recipe.machine.micro_batch)
        raise RecipeError(
            f"machine.micro_batch = {recipe.machine.micro_batch} does not divide the {windows} windows of a step "
            f"(train.tokens_per_step / model.context): try {near}"
        )
    if recipe.tokenizer.vocabulary < 264 + len(recipe.tokenizer.terms):
        raise RecipeError(
            f"tokenizer.vocabulary = {recipe.tokenizer.vocabulary} is too small for 256 bytes and "
            f"{len(recipe.tokenizer.terms)} terms: at least {264 + len(recipe.tokenizer.terms)}"
        )
    model = replace(
        model, head_dim=head_dim, kv_heads=kv_heads, ffn_dim=model.ffn_dim or -(-model.dim * 8 // 3 // 64) * 64
    )
    skipped(recipe)
    if train.tokens:
        steps = -(-train.tokens // train.tokens_per_step)
        refuse_short(recipe, "train.tokens", train.tokens, steps, train.tokens_per_step)
        train = replace(train, tokens=0, steps=steps)
    elif train.steps:
        refuse_short(recipe, "train.steps", train.steps, train.steps, 1)
    if train.steps and train.warmup > train.steps * (1 - train.decay) + 1e-6:
        raise RecipeError(
            f"train.warmup = {train.warmup} steps and train.decay = {train.decay:g} of the run overlap in a run of "
            f"{train.steps} steps: at most train.warmup={max(0, int(train.steps * (1 - train.decay) + 1e-6))}"
        )
    return replace(recipe, model=model, train=train)


def refuse_short(recipe: Recipe, name: str, length: float, steps: int, step: float) -> None:
    """RecipeError where a run of this length, one of LENGTHS, ends before it has gone beyond `from`.

    A `step` is that much of the length.
    """
    if recipe.from_ and steps <= recipe.from_step:
        also = "" if name == "train.steps" else f", {steps:,} steps,"
        raise RecipeError(
            f"{name} = {length:,.10g}{also} does not go beyond from = {recipe.from_}: lengths count from step 0; "
            f"say {name}={math.ceil(1000 * (recipe.from_step * step + length)) / 1000:.12g} to train as much again"
        )


def with_steps(recipe: Recipe, tokens_per_epoch: int) -> Recipe:
    """The recipe with all that depends on the text settled, for a training side of `tokens_per_epoch` tokens.

    That is a length in epochs, weight decay in epochs, and what is `auto` by the number of epochs (few, in a run whose
    length is a time).
    """
    model, train = recipe.model, recipe.train
    steps = train.steps
    if train.epochs:
        steps = max(1, round(train.epochs * tokens_per_epoch / train.tokens_per_step))
        refuse_short(recipe, "train.epochs", train.epochs, steps, train.tokens_per_step / tokens_per_epoch)
    epochs = steps * train.tokens_per_step / tokens_per_epoch
    if model.dropout == "auto":
        model = replace(model, dropout=MANY_EPOCHS_DROPOUT if epochs > MANY_EPOCHS else 0.0)
    decay = train.weight_decay
    if decay == "auto":
        decay = Epochs(f"{FORGOTTEN_AFTER} epochs") if epochs > 1 else 0.1
    if isinstance(decay, str):  # 1 / (rate x decay) steps are the time constant
        tokens = max(1e-9, train.learning_rate) * tokens_per_epoch * float(decay.split()[0])
        decay = float(f"{min(MOST_DECAY, train.tokens_per_step / tokens):.6g}")
    return resolve(replace(recipe, model=model, train=replace(train, epochs=0.0, steps=steps, weight_decay=decay)))


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every key, dotted, with its value as JSON knows it."""
    values: dict[str, Any] = {}
    for each in fields(recipe):
        value = getattr(recipe, each.name)
        if is_dataclass(value):
            values.update({f"{each.name}.{leaf.name.rstrip('_')}": getattr(value, leaf.name) for leaf in fields(value)})
        else:
            values[each.name.rstrip("_")] = value
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_RANGE = re.compile(r"\s*([0-9]{1,12})(?:-([0-9]{1,12}))?\s*")


def skipped(recipe: Recipe) -> tuple[tuple[int, int], ...]:
    """The ranges of train.skip, first and last step each; RecipeError for one that is none."""
    ranges: list[tuple[int, int]] = []
    for text in recipe.train.skip:
        match = _RANGE.fullmatch(text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if high < low or low < 1 or any(low <= other[1] and other[0] <= high for other in ranges):
            raise RecipeError(
                f"train.skip = {text!r}: ranges that do not overlap are expected, such as 1200-1210; "
                "steps count from 1, as in the messages of a run"
            )
        ranges.append((low, high))
    return tuple(ranges)


def checkpoint_name(from_: str | None) -> str | None:
    """RUN/step-74 as RUN/step-000074, the name of its folder: both are one checkpoint."""
    return from_ and re.sub(r"(?<=/step-)[0-9]{1,15}$", lambda step: f"{int(step[0]):06d}", from_)


def counted_from_1(ranges: str | list[str]) -> list[str]:
    """A train.skip of format 1, which counted steps from 0, with the same steps counted from 1."""
    ranges = [ranges] if isinstance(ranges, str) else ranges
    return [
        "-".join(str(int(step) + 1) for step in match.groups() if step) if (match := _RANGE.fullmatch(text)) else text
        for text in ranges
    ]


def science(recipe: Recipe) -> dict[str, Any]:
    """The half that decides the curve, flat."""
    return {name: value for name, value in flat(recipe).items() if not name.startswith(MACHINE_HALF)}


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
