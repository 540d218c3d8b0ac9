"""Hints before and after a run: facts about text and run, then the one change that would help most.

They follow the measurements in recipes/README.md, where more pieces always win and dropout pays only if the text is
read many times. FRESH and LONG_READ come from the literature on larger models.
"""

from typing import Any

from llm.config.resolving import MANY_EPOCHS
from llm.config.schema import Recipe
from llm.model import cost

FRESH = 4  # epochs that are worth almost as much as fresh text
LEARNT_BY_HEART = 0.5  # nats of validation loss above training loss that show memorisation
LONG_READ = 40  # tokens read per parameter, beyond which a larger model learns more from them
SHORT_DECAY = 0.4  # fraction of a run: shorter decays of the learning rate ended worse, none by far the worst


def of_text(recipe: Recipe, tokens: int, vocab_size: int) -> str:
    """Two lines before a run with a known number of steps: what its `tokens` tokens allow, and a hint."""
    model, train = recipe.model, recipe.train
    read, numbers = train.steps * train.tokens_per_step, cost.parameters(model, vocab_size)
    pieces = vocab_size * model.dim * (1 if model.tied else 2) / numbers
    epochs = read / tokens
    if train.hours:
        change = f"more hours until the text is read {FRESH} times, then more text; the run says how often it was"
    elif epochs < FRESH:
        change = f"reading the text more often, up to {FRESH} times for almost full worth: train.epochs={FRESH}"
    elif epochs > MANY_EPOCHS and not model.dropout:
        change = f"dropout, as the text is read more than {MANY_EPOCHS} times: model.dropout=auto"
    elif read > LONG_READ * numbers and tokens > numbers:  # else a larger model would memorise the text
        change = f"a larger model, as each weight sees {read / numbers:,.0f} tokens: model.layers={model.layers * 2}"
    else:
        change = "more text"
    times = f"{train.hours:g} h" if train.hours else f"{epochs:.2f} times"
    return (
        f"the text allows: {tokens / 1e6:.2f} M unique tokens, read {times} by {numbers / 1e6:.2f} M "
        f"parameters, {pieces:.0%} of them in the vocabulary\nwhat would help most: {change}"
    )


def of_run(recipe: Recipe, evaluations: list[dict[str, Any]]) -> str:
    """One line after a run: the trend of its `evaluations`, which are in order, and a hint."""
    best, last = min(evaluations, key=lambda each: each["bits_per_byte"]), evaluations[-1]
    by_heart = last["val_loss"] - last.get("train_loss", last["val_loss"]) >= LEARNT_BY_HEART
    worse, epochs = best["step"] < last["step"], last["epochs_seen"]
    if worse:
        said = (
            f"more epochs stopped paying after step {best['step']:,}, epoch {best['epochs_seen']:.2f}: "
            f"{best['bits_per_byte']:.4f} bits per byte there, which is kept, {last['bits_per_byte']:.4f} now"
        )
    elif len(evaluations) > 1:
        said = f"validation fell to the end, epoch {epochs:.2f}"
    else:
        said = f"one evaluation shows no trend, evaluate.every={max(1, last['step'] // 4)} would"
    if by_heart and epochs > MANY_EPOCHS and not recipe.model.dropout:
        change = "more text, or model.dropout=auto"
    elif by_heart:
        change = "more text" + (f", or a run of train.epochs={best['epochs_seen']:.2g}" if worse else "")
    elif worse and recipe.train.decay < SHORT_DECAY:
        change = "a rate that falls for longer: train.decay=60%"
    elif worse:
        change = "a larger model"
    else:
        change = "a longer run" + ("" if epochs < FRESH else ", or a larger model")
    return f"{said}; what would help: {change}"
