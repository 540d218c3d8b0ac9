"""Plans: what a recipe needs before it is trained, by formula and table, without torch.

Memory is llm.model.cost's formula. Speed comes from the device's figures and two constants fitted to the runs of
tests/benchmarks/README.md, so that it is right within a factor of two; `probe` measures it instead.
"""

import contextlib
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.base import atomic_io
from llm.base.constants import CHUNK_NUMBERS
from llm.base.durations import readable
from llm.base.errors import LLMError, RecipeError, StoppedError, TextError
from llm.config.resolving import cpu_micro_batch, divisors, vocabulary_for, with_steps
from llm.config.schema import MIN_VOCAB_SIZE, STEP, Model, Recipe, Text
from llm.data.sources import sources_of
from llm.data.text_files import packed_as
from llm.insight.cards import GIB, Device
from llm.model import cost, hf_config

if TYPE_CHECKING:
    from llm.data.shards import AnyShards

# Bytes of held-out text per token (BOS included) by number of pieces: means over the packaged English, French and
# Spanish texts and Python's standard library, which lie within 9 % of them (2026-11-28).
BYTES_PER_TOKEN = {1024: 2.38, 2048: 2.85, 4096: 3.25, 8192: 3.58, 16384: 3.84, 32768: 4.00}
PACKAGED = {"wiki-leads": 5_039_867, "wiki-leads-fr": 3_828_751, "wiki-leads-es": 2_830_813, "chitchat": 16_401_951}
# bytes of text
GZIPPED = 3.0  # bytes of text for each byte of a .gz file
CONTEXT, SLACK = 0.6 * GIB, 1.06  # bytes that CUDA itself takes; what its allocator holds beside live tensors
GPU_SHARE = 0.6  # of a card's matrix throughput that large products reach
GPU_BYTES = 850  # that a block moves per token and feature
GPU_BLOCK = 0.5e-3  # seconds that a card needs for a block forward and backward, however few its tokens
EAGER = 2.0  # slowdown of a GPU without compiling; under machine.compile=auto, runs of a minute or two have it too
CPU_SHARE, CPU_WIDTH = 0.85, 90  # a CPU's share of its product's speed: CPU_SHARE / (1 + CPU_WIDTH / dim)
CPU_BLOCK = 3e-3  # seconds of a step that a CPU needs for a block, however few its tokens (2026-11-30, AVX2, two cores)
FORWARD = 3.5  # an evaluation reads so many times more tokens per second than training
PROBE_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """The needs of a run of `recipe` (its length in steps, if tokens or speed are known) on `device`."""

    recipe: Recipe
    device: Device
    parameters: dict[str, int]  # by part: embeddings, attention, MLP, norms
    memory: cost.StepMemory  # bytes of live tensors
    micro_batch: int  # windows; 1 if none fits
    fits: bool
    text_tokens: int  # of the training side; 0: unknown
    validation_tokens: int
    text_is_estimated: bool
    vocab_size: int
    shard_bytes: int
    checkpoint_bytes: int  # of one
    checkpoints: int  # at once, with the one being written
    tokens_per_second: float  # 0: unknown
    speed_is_measured: bool
    sources: dict[str, float] = field(default_factory=dict)  # tokens of the training side of each of text.sources

    @property
    def steps(self) -> int:
        """Steps that the run makes, after those of the checkpoint that it goes on from; 0: unknown."""
        return max(0, self.recipe.train.steps - self.recipe.from_step)

    @property
    def tokens(self) -> int:
        """Tokens that the run reads; 0 if its length is not known yet."""
        return self.steps * self.recipe.train.tokens_per_step

    @property
    def copy_bytes(self) -> int:
        """Of main memory, for the copy from which checkpoints are written beside the training.

        0 where an evaluation follows each of them, as it waits for the checkpoint and the weights stay as they are.
        """
        every, steps = self.recipe.checkpoint.every, self.recipe.train.steps
        evaluated = self.validation_tokens or self.recipe.evaluate.prompts
        beside = (not evaluated or every % self.recipe.evaluate.every) and (not steps or steps > every)
        return self.checkpoint_bytes if beside else 0

    @property
    def epochs(self) -> float:
        """Passes over the text; 0: unknown."""
        return self.tokens / self.text_tokens if self.text_tokens else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole run with its evaluations; 0: unknown."""
        if not (self.tokens_per_second and self.tokens):
            return 0.0
        shape, train = self.recipe.model, self.recipe.train
        train = replace(train, steps=self.steps, shallow=0 if self.recipe.from_ else train.shallow)
        also = teachers_cost(self.recipe)[1]
        # Of the steps whose speed is known.
        each = cost.flops_per_token(shape, cost.covered(train, self.vocab_size)) + also
        evaluated = -(-self.steps // self.recipe.evaluate.every) * self.validation_tokens / FORWARD
        evaluation = evaluated * cost.flops_per_token(shape, self.vocab_size)
        flops = cost.run_flops(shape, train, self.vocab_size) + also * self.tokens + evaluation
        return flops / each / self.tokens_per_second


def plan(recipe: Recipe, device: Device, tokens_per_second: float = 0.0) -> Plan:
    """The plan of a recipe on `device`; a measured speed, if given, replaces the tabulated one.

    RecipeError or RefusedError for model.from and tokenizer.path that lead nowhere.
    """
    given, recipe = recipe.tokenizer, sized(recipe)
    vocab_size = recipe.tokenizer.vocab_size
    train, validation, documents, estimated = text_tokens(replace(recipe, tokenizer=given), vocab_size)
    speed = tokens_per_second or tabulated_speed(recipe, device)
    if recipe.train.hours and speed:
        steps = max(1, round(recipe.train.hours * 3600 * speed / recipe.train.tokens_per_step))
        schedule = replace(recipe.train, steps=steps, hours=0.0, warmup=min(recipe.train.warmup, steps // 4))
        recipe = replace(recipe, train=schedule)
    if recipe.train.steps or (recipe.train.epochs and train):
        recipe = with_steps(recipe, train or recipe.train.steps * recipe.train.tokens_per_step)
    elif recipe.model.dropout == "auto":
        recipe = replace(recipe, model=replace(recipe.model, dropout=0.0))
    micro_batch, fits = micro_batch_that_fits(recipe, device)
    memory, each = step_memory(recipe, device, micro_batch), 2 if vocab_size <= 1 << 16 else 4
    return Plan(
        replace(recipe, tokenizer=given), device, parts(recipe), memory, micro_batch, fits,
        train, validation, estimated, vocab_size,
        shard_bytes=(train + validation) * each + 4 * documents, checkpoint_bytes=memory.weights + memory.moments,
        checkpoints=min(recipe.checkpoint.keep + 2, saves(recipe, evaluated=validation > 0) or sys.maxsize),
        tokens_per_second=speed, speed_is_measured=bool(tokens_per_second), sources=source_tokens(recipe, train),
    )  # fmt: skip


def saves(recipe: Recipe, *, evaluated: bool) -> int:
    """How often a run is saved: every checkpoint.every steps, before each evaluation, and at its end; 0: unknown."""
    first, last, paces = recipe.from_step, recipe.train.steps, [recipe.checkpoint.every]
    saved = last // paces[0] - first // paces[0]
    if evaluated or recipe.evaluate.prompts:
        paces.append(recipe.evaluate.every)
        both = math.lcm(*paces)  # steps of both kinds are saved once
        saved += last // paces[1] - first // paces[1] - (last // both - first // both)
    return saved + all(last % pace for pace in paces)


def sized(recipe: Recipe) -> Recipe:
    """The recipe with the shape and the number of pieces that model.from, tokenizer.path or the text provides."""
    if recipe.model.from_:
        shape, pieces = _shape_of("model.from", recipe.model.from_, recipe.model)
        recipe = replace(recipe, model=shape)
    elif recipe.tokenizer.path:
        from llm.data.tokenizer import Tokenizer  # takes half a second to import

        pieces = Tokenizer.load(atomic_io.expanded(recipe.tokenizer.path)).vocab_size
    else:
        if recipe.tokenizer.vocabulary != "auto":
            return recipe
        if shards := _prepared(recipe):
            pieces = int(next(iter(shards.sources.values())).manifest["vocabulary"])
        else:
            size = text_bytes(recipe) * (1 - recipe.text.validation) or math.inf  # unknown: as many as it can be
            pieces = vocabulary_for(size) + len(recipe.tokenizer.terms)
    return replace(recipe, tokenizer=replace(recipe.tokenizer, vocabulary=pieces))


def _shape_of(key: str, name: str, like: Model) -> tuple[Model, int]:
    """The sizes, with all else as `like`, and the number of pieces of the model that the key `key` names.

    That is a model folder, or a run, also as its `best` or `newest`: all of its checkpoints have one shape.
    """
    folder = atomic_io.expanded(name)
    if not os.path.exists(folder / "config.json"):  # noqa: PTH110  # pathlib raises where a name is too long
        run = folder.parent if re.fullmatch(f"best|newest|{STEP}", folder.name) else folder
        places = [each for each in (Path("runs") / run, run) if os.path.isdir(each)]  # noqa: PTH112
        found = next((config for each in places for config in each.glob("checkpoints/*/config.json")), None)
        if found is None:
            raise RecipeError(
                f"{key} = {folder} is not there: name a model folder with config.json, or a run, trained first"
            )
        folder = found.parent
    config = hf_config.read_config(folder)
    return replace(like, **{key: config[field] for key, field in hf_config.FIELDS.items()}), config["vocab_size"]


def teachers_cost(recipe: Recipe) -> tuple[int, int]:
    """Bytes of the weights of train.teachers, and FLOPs of their forward passes for each token."""
    found = [_shape_of("train.teachers", name, recipe.model) for name in recipe.train.teachers]
    weights = sum(4 * cost.parameters(shape, pieces) for shape, pieces in found)
    flops = [cost.flops_per_token(shape, cost.covered(recipe.train, pieces)) // 3 for shape, pieces in found]
    return weights, sum(flops)


def parts(recipe: Recipe) -> dict[str, int]:
    """Exact numbers of parameters by part; their sum is llm.model.cost.parameters."""
    matrices, vectors, ends = cost.tensors(recipe.model, recipe.tokenizer.vocab_size)
    layers, sizes = recipe.model.layers, [math.prod(each) for each in matrices]
    return {
        "embeddings": sum(map(math.prod, ends[:-1])),
        "attention": layers * sum(sizes[:4]),
        "MLP": layers * sum(sizes[4:]),
        "norms": layers * sum(map(math.prod, vectors)) + math.prod(ends[-1]),
    }


# ---------------------------------------------------------------------------------------------- memory


def step_memory(recipe: Recipe, device: Device, micro_batch: int) -> cost.StepMemory:
    """Live tensors of this recipe's step on `device`, in micro-batches of so many windows."""
    found = cost.step_memory(
        recipe.model,
        recipe.tokenizer.vocab_size,
        micro_batch,
        muon=recipe.train.optimizer == "muon",
        micro_batches=max(1, recipe.windows_per_step // micro_batch),
        half=in_half(recipe, device),
        cuda=device.cuda,
        recompute=recipe.machine.recompute,
    )
    if not recipe.train.teachers:
        return found
    # Beside the weights, chunks of logits in fp32: of a teacher, of their mean and of the gradient.
    chunks = 12 * CHUNK_NUMBERS["cuda" if device.cuda else "cpu"]
    return replace(found, peak=found.peak + teachers_cost(recipe)[0] + chunks)


def in_half(recipe: Recipe, device: Device) -> bool:
    """Whether machine.precision comes to bf16 or fp16 there."""
    precision = recipe.machine.precision
    return precision != "fp32" if device.cuda or precision != "auto" else device.half > device.single


def room(device: Device) -> float:
    """Bytes of live tensors that fit the device; infinite where its memory is unknown."""
    if not device.memory:
        return math.inf
    return (device.memory - (CONTEXT if device.cuda else 0)) / SLACK


def micro_batch_that_fits(recipe: Recipe, device: Device) -> tuple[int, bool]:
    """Windows of a micro-batch, as the recipe says or as the trainer finds them under `auto`; whether they fit."""
    windows = recipe.windows_per_step
    if recipe.machine.micro_batch != "auto":
        sizes = [recipe.machine.micro_batch]
    elif not device.cuda:
        sizes = [cpu_micro_batch(windows, recipe.model.context)]
    else:
        sizes = divisors(windows)
    fitting = [n for n in sizes if step_memory(recipe, device, n).peak <= room(device)]
    return (max(fitting), True) if fitting else (sizes[0], False)


# ---------------------------------------------------------------------------------------------- text


def text_tokens(recipe: Recipe, vocab_size: int = 0) -> tuple[int, int, int, bool]:
    """Tokens of the training and of the validation side, documents, and whether these are estimates; 0 if unknown.

    `vocab_size`: of a borrowed tokenizer, instead of the recipe's.
    """
    if not recipe.model.from_ and (shards := _prepared(recipe)):
        both = shards.train, shards.validation
        return both[0].tokens, both[1].tokens, both[0].documents + both[1].documents, False
    tokens = text_bytes(recipe) / bytes_per_token(vocab_size or sized(recipe).tokenizer.vocab_size)
    held_out = int(tokens * recipe.text.validation)
    return int(tokens) - held_out, held_out, 0, True


def _prepared(recipe: Recipe) -> "AnyShards | None":
    """The recipe's shards, if they were made before; what is wrong with a text is said when it is prepared."""
    if not atomic_io.expanded(recipe.text.cache or "data").is_dir():
        return None
    from llm.data.mixed_pipeline import find_shards  # takes half a second to import

    with contextlib.suppress(LLMError):
        return find_shards(recipe)
    return None


def text_bytes(recipe: Recipe) -> float:
    """Bytes of the text without reading it, by GZIPPED for compressed files; 0 where a size is not known."""
    sizes = [_size(name) for name in recipe.text.names]
    return sum(sizes) if all(sizes) else 0.0


def source_tokens(recipe: Recipe, tokens: int) -> dict[str, float]:
    """The `tokens` of the training side by source, in proportion to their bytes; empty where a size is not known."""
    sizes = {each.name: sum(map(_size, each.text.files)) for each in recipe.text.sources}
    return {name: tokens * size / sum(sizes.values()) for name, size in sizes.items()} if all(sizes.values()) else {}


def _size(name: str) -> float:
    """Bytes of one entry of text.files; 0 if it is not here, or on the hub."""
    if name in PACKAGED or name.startswith("hub:"):
        return PACKAGED.get(name, 0)
    try:
        paths = [source.path for source in sources_of(Text(files=(name,)))]
    except TextError:
        return 0
    return sum(path.stat().st_size * (GZIPPED if packed_as(path) else 1) for path in paths if path)


def bytes_per_token(vocab_size: int) -> float:
    """By the table, in between on a logarithmic scale; beyond its ends at the nearest slope."""
    sizes = sorted(BYTES_PER_TOKEN)
    high = next((n for n in sizes[1:] if n >= vocab_size), sizes[-1])
    low = sizes[sizes.index(high) - 1]
    part = math.log(max(vocab_size, MIN_VOCAB_SIZE) / low) / math.log(high / low)
    return BYTES_PER_TOKEN[low] + part * (BYTES_PER_TOKEN[high] - BYTES_PER_TOKEN[low])


# ---------------------------------------------------------------------------------------------- speed


def tabulated_speed(recipe: Recipe, device: Device) -> float:
    """Tokens per second by the device's figures, within a factor of two or so; 0 where they are unknown."""
    shape, half = recipe.model, in_half(recipe, device)
    flops = (
        cost.flops_per_token(shape, cost.covered(recipe.train, recipe.tokenizer.vocab_size)) + teachers_cost(recipe)[1]
    )
    again = 4 / 3 if recipe.machine.recompute else 1.0
    peak = device.half if half else device.single
    if not peak:
        return 0.0
    started = (GPU_BLOCK if device.cuda else CPU_BLOCK) * (shape.layers + 2) / recipe.train.tokens_per_step
    if not device.cuda:
        return 1 / ((flops / (CPU_SHARE * peak) * (1 + CPU_WIDTH / shape.dim) + started) * again)
    moved = GPU_BYTES * shape.layers * shape.dim * (1 if half else 2) / device.bandwidth
    return 1 / ((flops / (GPU_SHARE * peak) + moved + started) * again * (1 if recipe.machine.compile else EAGER))


def train_for_figures(
    recipe: Recipe, train: Callable[..., Any], on_log: Callable[[dict[str, Any]], None], until: int = -1
) -> None:
    """Train in a temporary run folder, to the end or `until` a step, for what `on_log` is told."""
    reached = -1

    def look(line: dict[str, Any]) -> None:
        nonlocal reached
        reached = line["step"]
        on_log(line)

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        try:
            train(recipe, runs=folder, on_log=look, **({"until": until} if until >= 0 else {}))
        except StoppedError:
            if 0 <= until <= reached:
                return
            raise StoppedError("stopped: nothing is kept of this, the same command begins it again") from None


def probe(recipe: Recipe, train: Callable[..., Any]) -> float:
    """Tokens per second of PROBE_STEPS real steps, trained on this machine in a temporary run folder.

    `train(recipe, runs=..., on_log=..., until=...)` trains. The text is prepared in its usual cache.
    """
    speeds: list[float] = []

    def look(line: dict[str, Any]) -> None:
        if "tokens_per_second" in line:
            speeds.append(line["tokens_per_second"])

    every, steps = max(1, PROBE_STEPS // 5), max(recipe.train.steps, 3 * PROBE_STEPS)
    short = replace(
        recipe, run="probe", from_=None,
        train=replace(recipe.train, steps=steps, tokens=0, epochs=0.0, hours=0.0, warmup=0, shallow=0),
        evaluate=replace(recipe.evaluate, every=10**9, prompts=()),
        checkpoint=replace(recipe.checkpoint, every=10**9),
        tracking=replace(recipe.tracking, every=every, wandb="off", tensorboard=False),
    )  # fmt: skip
    train_for_figures(short, train, look, until=PROBE_STEPS)
    return statistics.median(speeds[1:])  # the first steps are slow


# ---------------------------------------------------------------------------------------------- words


def _mixture(plan: Plan) -> Iterator[str]:
    """The share of each source, and how often the run reads it. RecipeError where that cannot be."""
    from llm.data.mixture import shares  # takes half a second to import

    found = shares(plan.recipe, {name: tokens / plan.recipe.model.context for name, tokens in plan.sources.items()})
    for name, tokens in plan.sources.items():
        yield f"{name} {found[name]:.1%} of the windows, about {plan.tokens * found[name] / tokens:.2f} epochs"


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    recipe, train, shape, memory = plan.recipe, plan.recipe.train, plan.recipe.model, plan.memory
    total, size = sum(plan.parameters.values()), cost.size
    about = "about " if plan.text_is_estimated else ""
    room_for = f" of {size(plan.device.memory)}" if plan.device.memory else ""
    said = [
        f"{recipe.run}: {total:,} parameters: "
        + ", ".join(f"{name} {count:,} ({count / total:.0%})" for name, count in plan.parameters.items()),
        f"memory of a step: {size(memory.peak)} at its peak{room_for} ({plan.device.name}): weights "
        f"{size(memory.weights)}, gradients {size(memory.gradients)}, moments {size(memory.moments)}, activations "
        f"{size(memory.activations)}, logits {size(memory.logits)}"
        + (f", teachers {size(teachers_cost(recipe)[0])}" if train.teachers else "")
        + (f"; and {size(plan.copy_bytes)} of main memory to write checkpoints from" if plan.copy_bytes else ""),
    ]
    windows = f"{plan.micro_batch:,} of the {recipe.windows_per_step:,} windows of {shape.context:,} tokens of a step"
    if plan.fits:
        said.append(f"micro-batch: {windows}")
    else:
        change = "machine.recompute=true, or a smaller" if not recipe.machine.recompute else "a smaller"
        smaller = "machine.micro_batch, " if plan.micro_batch > 1 else ""
        said.append(f"micro-batch: {windows} does not fit: use {change} {smaller}model.context or model.dim")
    if plan.text_tokens:
        mark = " (an estimate: the text is not prepared)" if plan.text_is_estimated else ""
        said.append(
            f"text: {about}{plan.text_tokens / 1e6:,.2f} M tokens to train on, "
            f"{plan.validation_tokens / 1e6:,.2f} M held out{mark}"
        )
    else:
        said.append(f"text: the size of {', '.join(recipe.text.names)[:80]} is not known here")
    if plan.tokens:
        times = f", {about}{plan.epochs:.2f} epochs" if plan.epochs else ""
        said.append(
            f"length: {plan.steps:,} steps of {train.tokens_per_step:,} tokens = "
            f"{plan.tokens / 1e6:,.2f} M tokens{times}"
            + (f", after the {recipe.from_step:,} of {recipe.from_}" if recipe.from_ else "")
        )
    if plan.sources and plan.tokens:
        said.append(f"mixture: {'; '.join(_mixture(plan))}")
    kept = plan.checkpoints * plan.checkpoint_bytes
    shards = f"shards {about}{size(plan.shard_bytes)}, " if plan.shard_bytes else ""
    said.append(
        f"disk: {shards}checkpoints {size(kept)} (at most {plan.checkpoints} of {size(plan.checkpoint_bytes)} at once)"
    )
    if plan.seconds:
        how = "measured" if plan.speed_is_measured else "by table, within a factor of two; --probe measures it"
        said.append(f"time: about {readable(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s ({how})")
    elif plan.tokens_per_second:
        said.append(f"time: not known, as the length of the run is not; about {plan.tokens_per_second:,.0f} tokens/s")
    else:
        said.append("time: not known: name a card by --gpu, or measure with --probe")
    return said
