"""Resolve a recipe: fill in the keys that follow from others, and refuse combinations that cannot work."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from llm.base.errors import RecipeError
from llm.config.schema import LENGTHS, MIN_VOCAB_SIZE, RUN_NAME, STEP, Epochs, Model, Recipe, Train

RULES = ("auto", "headings", "blank-lines", "blocks", "lines", "files")  # of text.documents, besides marker LINE
MARKER_BYTES = 1 << 15  # a LINE is shorter
MANY_EPOCHS, MANY_EPOCHS_DROPOUT = 15, 0.1  # above this many epochs, model.dropout = auto is this
FORGOTTEN_AFTER = 0.7  # epochs: the time constant of train.weight_decay = auto
MAX_DECAY = 3.2  # per step, however short the time constant
PIECES = ((3e6, 16384), (1.6e6, 8192), (5e5, 4096), (1.5e5, 2048), (0, 1024))  # tokenizer.vocabulary = auto, by bytes
CPU_TOKENS = 2048  # of a micro-batch on a CPU: more are no faster there
_RANGE = re.compile(r"\s*([0-9]{1,12})(?:-([0-9]{1,12}))?\s*")


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its dependent keys filled in and its contradictions refused.

    A length in epochs or hours stays, since it depends on the text or on the machine.
    """
    _check_values(recipe)
    model = _resolve_model(recipe.model)
    _check_sizes(recipe)
    skipped(recipe.train.skip)
    return replace(recipe, from_=checkpoint_name(recipe.from_), model=model, train=_resolve_length(recipe))


def _check_values(recipe: Recipe) -> None:
    if not re.fullmatch(RUN_NAME, recipe.run):
        raise RecipeError(
            f"run = {recipe.run[:120]!r}: expected at most 100 letters (a to z, A to Z), digits, '_', '.' and '-', "
            f"beginning with neither '.' nor '-', because it names a folder under runs/: say run=NAME"
        )
    if recipe.from_ is not None and not re.fullmatch(f"{RUN_NAME}/{STEP}", recipe.from_):
        raise RecipeError(f"from = {recipe.from_[:120]!r}: expected RUN/step-N, such as quickstart/step-000400")
    _check_sources(recipe)
    check_rule("text.documents", recipe.text.documents)
    for source in recipe.text.sources:
        check_rule(f"text.sources.{source.name}.documents", source.text.documents)
    if any(not term or "\n" in term for term in recipe.tokenizer.terms):
        raise RecipeError("tokenizer.terms: each term must be one or more words on one line, and not empty")
    if recipe.model.from_ is not None and recipe.train.shallow:
        raise RecipeError("train.shallow is for weights that begin at random: set train.shallow=0 beside model.from")
    if recipe.model.from_ is not None and (recipe.tokenizer.path or recipe.tokenizer.terms):
        raise RecipeError("model.from brings its own tokenizer: remove tokenizer.path and tokenizer.terms")
    check_lengths([name for name in LENGTHS if getattr(recipe.train, name.split(".")[1])])


def _check_sources(recipe: Recipe) -> None:
    files, sources = recipe.text.files, recipe.text.sources
    if files and sources:
        raise RecipeError("text.files and text.sources given: a run needs exactly one of them")
    if not (files or sources):
        raise RecipeError("text.files is empty: name at least one text")
    for source in sources:
        name = f"text.sources.{source.name}"
        if not source.text.files:
            raise RecipeError(f"{name}.files is empty: name at least one text")
        if source.weight is None and source.epochs is None:
            raise RecipeError(
                f"{name} has no weight: give it {name}.weight, its share of the windows, or {name}.epochs"
            )
        if source.epochs is not None and recipe.train.hours:
            raise RecipeError(f"{name}.epochs needs a length in steps, tokens or epochs, not train.hours: use a weight")


def check_lengths(said: Sequence[str]) -> None:
    """RecipeError unless one length alone is said."""
    if len(said) != 1:
        mend = ": keep one of them" if said else ""
        given = " and ".join(said) or "no length"
        raise RecipeError(f"{given} given: a run needs exactly one of {', '.join(LENGTHS)}{mend}")


def check_rule(key: str, name: str) -> None:
    """RecipeError unless `name`, the value of `key`, is a rule to find documents by (see documents.rule_for)."""
    line = name.removeprefix("marker ")
    is_marker = line not in ("", name) and "\n" not in line and len(line.encode()) < MARKER_BYTES
    if name not in RULES and not is_marker:
        raise RecipeError(f"{key} = {name[:80]!r} is not known: use {', '.join(RULES)} or marker LINE")


def _resolve_model(model: Model) -> Model:
    if not model.head_dim and model.dim % model.heads:
        fault = f"model.dim = {model.dim} is not divisible by model.heads = {model.heads}"
        raise RecipeError(f"{fault}: set model.head_dim, for example {max(2, model.dim // model.heads // 2 * 2)}")
    head_dim = model.head_dim or model.dim // model.heads
    if head_dim % 2:
        even = f"an even number, for example {head_dim + 1}"
        raise RecipeError(f"model.head_dim = {head_dim}: rotary positions need {even}")
    kv_heads = model.kv_heads or model.heads
    if model.heads % kv_heads:
        fit = divisors(model.heads)
        raise RecipeError(f"model.kv_heads = {kv_heads} does not divide model.heads = {model.heads}: use one of {fit}")
    ffn_dim = model.ffn_dim or default_ffn_dim(model.dim)
    return replace(model, head_dim=head_dim, kv_heads=kv_heads, ffn_dim=ffn_dim)


def default_ffn_dim(dim: int) -> int:
    """model.ffn_dim = 0 for this model.dim."""
    return -(-dim * 8 // 3 // 64) * 64


def _check_sizes(recipe: Recipe) -> None:
    """RecipeError unless windows, micro-batches and the vocabulary fit."""
    tokens, context, micro_batch = recipe.train.tokens_per_step, recipe.model.context, recipe.machine.micro_batch
    if tokens % context:
        fault = f"train.tokens_per_step = {tokens} is not a multiple of model.context = {context}"
        raise RecipeError(f"{fault}: try {max(1, round(tokens / context)) * context}")
    windows = recipe.windows_per_step
    if isinstance(micro_batch, int) and windows % micro_batch:
        fault = f"machine.micro_batch = {micro_batch} does not divide the number of windows in a step, {windows}"
        nearest = max(n for n in divisors(windows) if n <= micro_batch)
        raise RecipeError(f"{fault} (train.tokens_per_step / model.context): try {nearest}")
    vocab_size, terms = recipe.tokenizer.vocabulary, len(recipe.tokenizer.terms)
    if vocab_size != "auto" and vocab_size < (least := MIN_VOCAB_SIZE + terms):
        fault = f"tokenizer.vocabulary = {vocab_size} is too small for 256 bytes and {terms} terms"
        raise RecipeError(f"{fault}: use at least {least}")


def _resolve_length(recipe: Recipe) -> Train:
    """The schedule with a length in tokens turned into steps."""
    train = recipe.train
    if train.tokens:
        steps = -(-train.tokens // train.tokens_per_step)
        refuse_short(recipe, "train.tokens", train.tokens, steps, train.tokens_per_step)
        train = replace(train, tokens=0, steps=steps)
    elif train.steps:
        refuse_short(recipe, "train.steps", train.steps, train.steps, 1)
    before_decay = train.steps * (1 - train.decay) + 1e-6
    if train.steps and train.warmup > before_decay:
        raise RecipeError(
            f"train.warmup = {train.warmup} steps and train.decay = {train.decay:g} of the run overlap where "
            f"train.steps = {train.steps}: use at most train.warmup={max(0, int(before_decay))}"
        )
    return train


def refuse_short(recipe: Recipe, name: str, length: float, steps: int, per_step: float) -> None:
    """RecipeError if a run of `length`, the value of the key `name`, ends at or before the checkpoint it starts from.

    `steps` is the length in steps; `per_step` is the part of the length that one step takes.
    """
    if recipe.from_ and steps <= recipe.from_step:
        also = "" if name == "train.steps" else f", {steps:,} steps,"
        raise RecipeError(
            f"{name} = {length:,.10g}{also} does not go beyond from = {checkpoint_name(recipe.from_)}: lengths count "
            f"from step 0; say {name}={math.ceil(1000 * (recipe.from_step * per_step + length)) / 1000:.12g} "
            f"to train as much again"
        )


def with_steps(recipe: Recipe, tokens_per_epoch: int) -> Recipe:
    """The recipe with everything resolved that depends on the text, given the tokens of its training side.

    These are a length or a weight decay in epochs, and each `auto` by the number of epochs. A run whose length is a
    time counts as one of few epochs.
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
    if isinstance(decay, str):  # the time constant is 1 / (rate x decay) steps
        tokens = max(1e-9, train.learning_rate) * tokens_per_epoch * float(decay.split()[0])
        decay = float(f"{min(MAX_DECAY, train.tokens_per_step / tokens):.6g}")
    return resolve(replace(recipe, model=model, train=replace(train, epochs=0.0, steps=steps, weight_decay=decay)))


def vocabulary_for(text_bytes: float) -> int:
    """tokenizer.vocabulary = auto for a training side of so many bytes."""
    return next(pieces for least, pieces in PIECES if text_bytes >= least)


def with_vocabulary(recipe: Recipe, vocab_size: int) -> Recipe:
    """The recipe with tokenizer.vocabulary = auto as the number that it came to."""
    if recipe.tokenizer.vocabulary != "auto":
        return recipe
    return replace(recipe, tokenizer=replace(recipe.tokenizer, vocabulary=vocab_size))


def cpu_micro_batch(windows: int, context: int) -> int:
    """machine.micro_batch = auto on a CPU, for a process that reads this many windows a step."""
    return max((n for n in divisors(windows) if n <= CPU_TOKENS // context), default=1)


def skipped(skip: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The ranges of a train.skip as (first step, last step). RecipeError if one is malformed or overlaps another."""
    ranges: list[tuple[int, int]] = []
    for text in skip:
        match = _RANGE.fullmatch(text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if high < low or low < 1 or any(low <= other[1] and other[0] <= high for other in ranges):
            rule = "ranges that do not overlap, such as 1200-1210; steps count from 1, as in the messages of a run"
            raise RecipeError(f"train.skip = {text!r}: expected {rule}")
        ranges.append((low, high))
    return tuple(ranges)


def checkpoint_name(from_: str | None) -> str | None:
    """RUN/step-74 as RUN/step-000074, the name of the checkpoint's folder."""
    return from_ and re.sub(r"(?<=/step-)[0-9]{1,15}$", lambda step: f"{int(step[0]):06d}", from_)


def counted_from_1(ranges: str | list[str]) -> list[str]:
    """A train.skip of recipe format 1, whose steps counted from 0, as the same steps counted from 1."""
    ranges = [ranges] if isinstance(ranges, str) else ranges
    return [
        "-".join(str(int(step) + 1) for step in match.groups() if step) if (match := _RANGE.fullmatch(text)) else text
        for text in ranges
    ]


def divisors(number: int) -> list[int]:
    """All divisors in ascending order, in time that grows with the root of `number`."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
