"""The keys of a recipe, with their types, units, bounds and defaults.

Science decides the loss curve; machine decides only how fast and where it is computed.
"""

import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

Auto: TypeAlias = Literal["auto"]
Epochs = typing.NewType("Epochs", str)  # such as "0.7 epochs": a time constant, counted in passes over the text
LEAST_VOCABULARY = 264  # every byte, the pieces without text, and some room
NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # of a run: never a way out of runs/
STEP = "step-([0-9]{1,15})"  # a checkpoint's folder
TAKEN = "best|newest|checkpoints|step-.*"  # what stands behind RUN/ for its checkpoints: no run's name
AUTO_PROMPTS = ("auto",)
LENGTHS = ("train.steps", "train.tokens", "train.epochs", "train.hours")  # a recipe names exactly one
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


def science(recipe: Recipe) -> dict[str, Any]:
    """The half that decides the curve, flat."""
    return {name: value for name, value in flat(recipe).items() if not name.startswith(MACHINE_HALF)}


@cache
def sections() -> tuple[str, ...]:
    return tuple(name for name, kind in typing.get_type_hints(Recipe).items() if is_dataclass(kind))


@cache
def keys_of(section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{each.name.rstrip('_')}" for each in fields(typing.get_type_hints(Recipe)[section]))


def single_keys() -> tuple[str, ...]:
    return tuple(each.name.rstrip("_") for each in fields(Recipe) if each.name not in sections())


@cache
def keys() -> tuple[str, ...]:
    """Every key of a recipe, dotted."""
    return single_keys() + tuple(key for section in sections() for key in keys_of(section))
