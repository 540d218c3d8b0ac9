"""Resolving a recipe: what follows from other keys is filled in, and what contradicts them is refused."""

import math
import re
from dataclasses import replace

from llm.base.errors import RecipeError
from llm.config.schema import LENGTHS, NAME, STEP, Epochs, Recipe

MANY_EPOCHS, MANY_EPOCHS_DROPOUT = 8, 0.1  # what dropout = auto comes to where the text is read more often than this
FORGOTTEN_AFTER = 0.7  # epochs: the time constant of weight_decay = auto
MOST_DECAY = 3.2  # that a time constant may ask for
_RANGE = re.compile(r"\s*([0-9]{1,12})(?:-([0-9]{1,12}))?\s*")


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
