"""Every key of a recipe: its type, description, default and bounds.

The keys fall into two halves. Science decides the loss curve; machine decides only how fast the run goes, where it runs
and where its files are.
"""

import re
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

Auto: TypeAlias = Literal["auto"]
Epochs = typing.NewType("Epochs", str)  # a time constant in passes over the text, such as "0.7 epochs"

MIN_VOCAB_SIZE = 268  # 256 bytes, the pieces without text, and a few to spare
RUN_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # cannot lead out of runs/
STEP = "step-([0-9]{1,15})"  # a checkpoint's folder
RESERVED_NAMES = "best|newest|checkpoints|step-.*"  # RUN/best and the like name checkpoints
AUTO_PROMPTS = ("auto",)
SOURCE_KEY = r"text\.sources\.([A-Za-z0-9_-]{1,40})\.(\w+)"  # a key of one of text.sources
LENGTHS = ("train.steps", "train.tokens", "train.epochs", "train.hours")  # a recipe sets exactly one
# The text's location is machine too: its content has a fingerprint of its own.
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


def setting(description: str, default: Any = MISSING, **bounds: float) -> Any:
    """A key of the recipe. A number must satisfy least <= number < below, or least <= number <= most."""
    return field(default=default, metadata={"description": description, **bounds})


@dataclass(frozen=True, kw_only=True)
class Text:
    files: tuple[str, ...] = setting("files, folders, globs or named texts such as wiki-leads")
    documents: str = setting("auto, headings, blank-lines, blocks, lines, files, or: marker LINE", "auto")
    validation: float = setting("fraction of the documents held out", 0.05, least=0, below=1)
    field: str = setting("field of a row, or column of a table, that holds the text", "text")
    cache: str | None = setting("folder for prepared text; data/ by default", None)
    sources: "tuple[TextSource, ...]" = setting("several texts instead of text.files, by name, each with a weight", ())

    @property
    def names(self) -> tuple[str, ...]:
        """All that `files` or the sources name."""
        return self.files + tuple(name for source in self.sources for name in source.text.files)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One of text.sources. Its keys are those of `text` too, whose values it takes where it says nothing."""

    name: str
    text: Text
    weight: float | None = setting(
        "share of the windows, in proportion to the other weights", None, least=1e-6, below=1e6
    )
    epochs: float | None = setting(
        "passes over this text in the whole run, which set its share; with a weight as well, an upper limit",
        None, least=1e-6, below=1e6,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    vocabulary: int | Auto = setting(
        "number of pieces; auto: by the size of the text", "auto", least=MIN_VOCAB_SIZE, below=1 << 24
    )
    terms: tuple[str, ...] = setting("words that are never split", ())
    path: str | None = setting("existing sentencepiece .model to use instead of training one", None)

    @property
    def vocab_size(self) -> int:
        """`vocabulary` as a number: for recipes whose text is prepared, or that planning.sized has estimated."""
        assert self.vocabulary != "auto", "take planning.sized(recipe), or the recipe of a prepared text"
        return self.vocabulary


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = setting("features", 256, least=1, below=1 << 20)
    layers: int = setting("blocks", 6, least=1, below=1 << 12)
    heads: int = setting("query heads", 4, least=1, below=1 << 12)
    kv_heads: int = setting("key and value heads; 0: as many as heads", 0, least=0, below=1 << 12)
    head_dim: int = setting("features per head; 0: dim / heads", 0, least=0, below=1 << 20)
    ffn_dim: int = setting(
        "features inside the MLP; 0: 8/3 dim, rounded up to a multiple of 64", 0, least=0, below=1 << 22
    )
    context: int = setting("tokens", 512, least=2, below=1 << 20)
    dropout: float | Auto = setting("fraction of the features; auto: by the number of epochs", 0.0, least=0, below=1)
    tied: bool = setting("input and output embeddings share one matrix", True)
    from_: str | None = setting(
        "folder of a Qwen3 or Llama model whose weights and tokenizer to start from, or a run, as runs/NAME/best", None
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = setting("optimizer updates", 0, least=1, below=1e15)
    tokens: int = setting("target tokens", 0, least=1, below=1e15)
    epochs: float = setting("passes over the training side", 0.0, least=1e-6, below=1e6)
    hours: float = setting("hours of training, such as 8h or 90min", 0.0, least=1e-4, below=1e5)
    on: Literal["auto", "assistant", "all"] = setting(
        "tokens of a conversation that are learnt: those of the assistant, or all; auto: the assistant's", "auto"
    )
    document_mask: bool = setting("attention stays within each document, instead of the whole window", True)
    tokens_per_step: int = setting("tokens", 8192, least=1, below=1e10)
    sampled_softmax: int = setting(
        "pieces that the training loss weighs each target against; 0: all", 0, least=0, below=1 << 31
    )
    shallow: int = setting(
        "steps, at the start, that train the first half of the blocks alone, in less time; at most half of the run",
        0,
        least=0,
        below=1e12,
    )
    teachers: tuple[str, ...] = setting(
        "finished runs with the same tokenizer, as runs/NAME/best, whose probabilities are learnt beside the text", ()
    )
    teachers_share: float = setting("share of the teachers in each target while the rate is full", 0.6, least=0, most=1)
    teachers_last: float = setting(
        "the teachers' share at the end, where the rate is zero; lower it if the run will outgrow its teachers",
        0.0,
        least=0,
        most=1,
    )
    optimizer: Literal["muon", "adamw"] = setting(
        "muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW for all", "muon"
    )
    learning_rate: float = setting("of Muon's matrices, or of AdamW", 0.02, least=0, below=10)
    warmup: int = setting("steps from zero to the full rate", 0, least=0, below=1e12)
    decay: float = setting("fraction of the run, at its end, over which the rate falls to zero", 0.4, least=0, most=1)
    weight_decay: float | Epochs | Auto = setting(
        "per step, times the rate; or the epochs over which weights are forgotten, such as 0.7 epochs; auto: by the "
        "number of epochs", 0.1, least=0, below=100,
    )  # fmt: skip
    clip: float = setting("largest norm of the gradient; 0: no clipping", 1.0, least=0, below=1e9)
    skip: tuple[str, ...] = setting("ranges of steps whose windows are left out, such as 1200-1210", ())
    on_nonfinite: Literal["stop", "skip"] = setting("reaction to a loss or gradient that is not finite", "stop")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    every: int = setting("steps", 500, least=1, below=1e12)
    also: tuple[str, ...] = setting(
        "other texts to evaluate on, also before the first step, to show what the model forgets",
        (),
    )
    prompts: tuple[str, ...] = setting(
        "texts to continue after each evaluation; auto: the opening of a document of the text", ()
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = setting("steps", 500, least=1, below=1e12)
    keep: int = setting("number of newest checkpoints to keep, besides the best", 2, least=1, below=1e6)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    every: int = setting("steps", 10, least=1, below=1e12)
    wandb: Literal["off", "offline", "online"] = setting("online needs a key, and is offline without one", "off")
    tensorboard: bool = setting("needs the package tensorboard", False)


@dataclass(frozen=True, kw_only=True)
class Machine:
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto: a fast one that the device supports", "auto")
    micro_batch: int | Auto = setting("windows that a process runs at once", "auto", least=1, below=1e9)
    stop_after: float = setting(
        "hours, such as 8h, after which the run saves and stops; 0: never", 0.0, least=0, below=1e6
    )
    threads: int | Auto = setting("CPU threads per process", "auto", least=1, below=4096)
    shard: Literal["none", "full", "hybrid"] = setting("full: across all processes, hybrid: within a node", "none")
    exact: bool = setting("the same bits on 1, 2, 4 ... processes, for more memory and traffic", False)
    recompute: bool = setting("recompute activations in the backward pass: less memory, a third slower", False)
    compile: bool | Auto = setting(
        "compile each block and, in 16 bits or on a GPU, the loss; auto: in runs so long that it saves more than it "
        "takes, where a C++ compiler or Triton works",
        "auto",
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. The attribute `from_` is the key `from`, here and under `model`."""

    run: str = setting("name of the folder under runs/")
    seed: int = setting("a whole number, 0 or more", 1, least=0, below=1 << 32)
    from_: str | None = setting("RUN/step-N: start from that checkpoint", None)
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
        """Updates done before this run's first one."""
        return int(self.from_.rpartition("-")[2]) if self.from_ else 0


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every dotted key with its value as a JSON type; those of text.sources only where there are any."""
    values: dict[str, Any] = {}
    for name, value in vars(recipe).items():
        if is_dataclass(value):
            values.update({f"{name}.{leaf.rstrip('_')}": each for leaf, each in vars(value).items()})
        else:
            values[name.rstrip("_")] = value
    for source in values.pop("text.sources"):
        values.pop("text.files", None)
        own = {"weight": source.weight, "epochs": source.epochs, **vars(source.text)}
        values.update({f"text.sources.{source.name}.{leaf}": own[leaf] for leaf in source_keys()})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def science(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide the loss curve, flat."""
    return {name: value for name, value in flat(recipe).items() if not _is_machine(name)}


def said(value: Any) -> str:
    """The value of a flat key as messages say it."""
    if value is None or value == []:
        return "nothing"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_machine(name: str) -> bool:
    source = re.fullmatch(SOURCE_KEY, name)
    return (f"text.{source[2]}" if source else name).startswith(MACHINE_HALF)


@cache
def sections() -> dict[str, type]:
    """The sections of a recipe, with the dataclass of each."""
    return {
        name: kind
        for name, kind in typing.get_type_hints(Recipe).items()
        if isinstance(kind, type) and is_dataclass(kind)
    }


def top_keys() -> tuple[str, ...]:
    """The keys outside any section."""
    return tuple(each.name.rstrip("_") for each in fields(Recipe) if each.name not in sections())


def section_keys(section: str) -> tuple[str, ...]:
    """The dotted keys of one section."""
    return tuple(f"{section}.{each.name.rstrip('_')}" for each in fields(sections()[section]))


@cache
def source_keys() -> tuple[str, ...]:
    """The keys of one of text.sources, below its name."""
    return ("weight", "epochs", *(each.name for each in fields(Text) if each.name not in ("cache", "sources")))


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key."""
    return top_keys() + tuple(key for section in sections() for key in section_keys(section))
