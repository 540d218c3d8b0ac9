"""What a text allows a recipe, and what came of it: each ends with the one change that would help most.

That up to four epochs cost almost nothing is what others found at larger sizes; when dropout pays was looked at for
some sizes of ours (recipes/README.md).
"""

from typing import Any

from llm import cost
from llm.recipe import MANY_EPOCHS, Recipe

FRESH = 4  # passes over a text that count almost as much as fresh text
LEARNT_BY_HEART = 0.5  # nats by which validation lies above training where a text was read too often for its size
LONG_READ = 40  # tokens read for each parameter, beyond which a larger model learns more from them


def of_text(recipe: Recipe, tokens: int, vocabulary: int) -> str:
    """What a training side of `tokens` tokens allows a recipe that knows its length in steps: two lines."""
    model, train = recipe.model, recipe.train
    read, numbers = train.steps * train.tokens_per_step, cost.parameters(model, vocabulary)
    pieces = vocabulary * model.dim * (1 if model.tied else 2) / numbers
    epochs = read / tokens
    if epochs < FRESH and not train.hours:
        change = f"reading the text more often, up to {FRESH} times for almost full worth: train.epochs={FRESH}"
    elif epochs > MANY_EPOCHS and not model.dropout:
        change = f"dropout, as the text is read more than {MANY_EPOCHS} times: model.dropout=auto"
    elif pieces > 0.5:
        change = f"fewer pieces, as they take most of the weights: tokenizer.vocabulary={max(512, vocabulary // 2)}"
    elif read > LONG_READ * numbers:
        change = f"a larger model, as each weight sees {read / numbers:,.0f} tokens: model.layers={model.layers * 2}"
    else:
        change = "more text"
    times = f"{train.hours:g} h" if train.hours else f"{epochs:.2f} times"
    return (
        f"the text allows: {tokens / 1e6:.2f} M unique tokens, read {times} by {numbers / 1e6:.2f} M "
        f"parameters, {pieces:.0%} of them in the vocabulary\nwhat would help most: {change}"
    )


def of_run(recipe: Recipe, evaluations: list[dict[str, Any]]) -> str:
    """From when on more epochs stopped paying, if they did, and what would help; `evaluations` in their order."""
    best, last = min(evaluations, key=lambda each: each["bits_per_byte"]), evaluations[-1]
    gap = last["val_loss"] - last.get("train_loss", last["val_loss"])
    if best["step"] < last["step"]:
        said = (
            f"more epochs stopped paying after step {best['step']:,}, epoch {best['epochs_seen']:.2f}: "
            f"{best['bits_per_byte']:.4f} bits per byte there, which is kept, {last['bits_per_byte']:.4f} now"
        )
    else:
        said = f"validation fell to the end, epoch {last['epochs_seen']:.2f}"
    if gap < LEARNT_BY_HEART:
        return f"{said}; what would help: a longer run" + ("" if last["epochs_seen"] < FRESH else ", or a larger model")
    if not recipe.model.dropout:
        return f"{said}; what would help: more text, or model.dropout=0.1"
    return f"{said}; what would help: more text, else a smaller model"
