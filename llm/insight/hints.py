"""Hints before and after a run: facts about text and run, then the one change that would help most, as overrides.

RULES are tried in order and the first that applies speaks. Each was held against a run that it advised on and the same
run with the change made: the table is in tests/benchmarks/README.md, `tests/benchmarks/advice.py` makes it again.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm.config.resolving import FORGOTTEN_AFTER, default_ffn_dim, vocabulary_for
from llm.config.schema import Recipe
from llm.insight import planning
from llm.model import cost

FRESH = 4  # epochs that are worth almost as much as fresh text
MEMORISED = 0.5  # nats of validation loss above training loss that show memorisation
RATE, RATES = 0.02, (0.007, 0.06)  # of Muon: the best one measured, and bounds beyond which a run ended worse
DECAY, SHORT_DECAY = 0.6, 0.4  # fraction of a run: shorter decays of the learning rate ended worse, none by far worst
LONG_WARMUP, WARMUP = 0.2, 0.05  # fractions of a run
FORGETS = (0.2, 3.0)  # epochs that weights remember, beyond which a run of several epochs ended worse
PIECES = ((8192, 1.2e6), (4096, 3e5))  # for texts of so many bytes at least, read once
MANY_PIECES = 4  # times those of `auto`: in a text that is read several times they ended 5 to 40 % behind
LONG_READ, SHORT_READ = 4, 1 / 50  # tokens read per parameter
PLAIN = re.compile(r"[\w%+,./:=@-]*")  # an override that shells take as it stands
NAME = re.compile(r"(?!(?i:null)$)[\w./](?:[\w./-]|[ :](?=[\w./-]))*")  # of a file, as it stands in a YAML list


@dataclass(frozen=True)
class Facts:
    """The facts that rules read: the recipe with its length in steps, the text, and the evaluations in order."""

    recipe: Recipe
    vocab_size: int
    unique: float  # tokens of the training side
    steps: int  # done, or planned; 0: unknown
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def read(self) -> float:
        return self.steps * self.recipe.train.tokens_per_step

    @property
    def epochs(self) -> float:
        return self.read / self.unique

    @property
    def parameters(self) -> int:
        return cost.parameters(self.recipe.model, self.vocab_size)

    @property
    def is_new(self) -> bool:
        """False for a run that goes on from weights, whose sizes are given and whose rates follow other rules."""
        return not (self.recipe.from_ or self.recipe.model.from_)

    @property
    def best(self) -> dict[str, Any]:
        return min(self.evaluations, key=lambda each: each["bits_per_byte"])

    @property
    def got_worse(self) -> bool:
        return bool(self.evaluations) and self.best["step"] < self.evaluations[-1]["step"]

    @property
    def memorises(self) -> bool:
        last = self.evaluations[-1] if self.evaluations else {"val_loss": 0.0}
        return last["val_loss"] - last.get("train_loss", last["val_loss"]) >= MEMORISED


@dataclass(frozen=True)
class Hint:
    """A reason and the `key=value` overrides that make the change."""

    why: str
    change: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.why}: {' '.join(each if PLAIN.fullmatch(each) else shlex.quote(each) for each in self.change)}"


def optimizer(run: Facts) -> Hint | None:
    if run.is_new and run.recipe.train.optimizer == "adamw":
        return Hint(
            "Muon learns more from each token than AdamW", ("train.optimizer=muon", f"train.learning_rate={RATE}")
        )
    return None


def rate(run: Facts) -> Hint | None:
    train = run.recipe.train
    if not run.is_new or train.optimizer != "muon" or RATES[0] <= train.learning_rate <= RATES[1]:
        return None
    word = "low" if train.learning_rate < RATES[0] else "high"
    return Hint(f"the rate is too {word}", (f"train.learning_rate={RATE}",))


def batch(run: Facts) -> Hint | None:
    """1,024 tokens a step for half a million tokens, growing with their number to the power 0.4."""
    train, context = run.recipe.train, run.recipe.model.context
    wanted = max(1, round(1024 * (run.read / 5e5) ** 0.4 / context)) * context
    if not run.read or train.tokens_per_step <= 4 * wanted:  # smaller steps learn as much, but take longer
        return None
    return Hint(f"only {run.steps:,} updates", (f"train.tokens_per_step={wanted}", *_tokens(run, 1)))


def warmup(run: Facts) -> Hint | None:
    steps = run.recipe.train.warmup
    if not run.steps or steps <= LONG_WARMUP * run.steps:
        return None
    return Hint(f"warming up takes {steps / run.steps:.0%} of the run", (f"train.warmup={int(WARMUP * run.steps)}",))


def decay(run: Facts) -> Hint | None:
    if run.recipe.train.decay >= SHORT_DECAY:
        return None
    return Hint("a rate that falls for longer ends lower", (f"train.decay={DECAY:.0%}",))


def forgetting(run: Facts) -> Hint | None:
    """Weight decay as the epochs after which weights are forgotten: 1 / (rate x decay) steps."""
    train = run.recipe.train
    if not run.is_new or run.epochs <= 1 or train.optimizer != "muon":
        return None
    per_epoch = train.learning_rate * float(train.weight_decay) * run.unique / train.tokens_per_step
    if FORGETS[0] <= 1 / max(per_epoch, 1e-9) <= FORGETS[1]:
        return None
    pace = f"{FORGOTTEN_AFTER}epochs" if train.hours else "auto"  # which takes a time for few epochs
    return Hint("weight decay does not fit the length of an epoch", (f"train.weight_decay={pace}",))


def dropout(run: Facts) -> Hint | None:
    if run.recipe.model.dropout in (0.0, "auto") or not run.steps or run.epochs > FRESH:
        return None
    return Hint("dropout costs where a text is read few times", ("model.dropout=0",))


def fewer_pieces(run: Facts) -> Hint | None:
    text_bytes = run.unique * planning.bytes_per_token(run.vocab_size)
    few = run.vocab_size < MANY_PIECES * vocabulary_for(text_bytes)
    if few or not run.is_new or run.recipe.tokenizer.path or run.epochs < 2:
        return None
    return Hint("fewer pieces, each of them seen more often", ("tokenizer.vocabulary=auto",))


def pieces(run: Facts) -> Hint | None:
    if not run.is_new or run.recipe.tokenizer.path:
        return None
    text_bytes = run.unique * planning.bytes_per_token(run.vocab_size)
    for size, least in PIECES:
        if run.epochs < 2 and run.vocab_size < size and text_bytes >= least:
            return Hint("more pieces learn more from each byte", (f"tokenizer.vocabulary={size}",))
    return None


def width(run: Facts) -> Hint | None:
    """A wider model where each weight has seen many tokens; a narrower one where it has seen next to none."""
    if not run.is_new or not run.read:
        return None
    if run.read > LONG_READ * run.parameters:
        return Hint(f"each weight sees {run.read / run.parameters:,.0f} tokens: a wider model", _wider(run, 2))
    if run.read < SHORT_READ * run.parameters and run.epochs < FRESH / 3 and (change := _wider(run, 1 / 2)):
        return Hint("a smaller model reads three times as much in that time", (*change, *_tokens(run, 3)))
    return None


def _tokens(run: Facts, times: int) -> tuple[str, ...]:
    """The override that makes a run so many times as long; none where the length is a time."""
    return () if run.recipe.train.hours else (f"train.tokens={times * run.read:.0f}",)


def _wider(run: Facts, factor: float) -> tuple[str, ...]:
    """Overrides for heads of the same size in other number; none where one head is to be halved."""
    model = run.recipe.model
    heads = round(model.heads * factor)
    if not heads:
        return ()
    grouped = [f"model.kv_heads={heads}"] if model.kv_heads != model.heads else []
    has_own = model.ffn_dim != default_ffn_dim(model.dim)
    own = [f"model.ffn_dim={math.ceil(model.ffn_dim * factor / 64) * 64}"] if has_own else []
    return (f"model.dim={heads * model.head_dim}", f"model.heads={heads}", *grouped, *own)


def shorter(run: Facts) -> Hint | None:
    if not run.got_worse:
        return None
    best = run.best
    return Hint("a shorter run, whose rate falls in time", (f"train.epochs={best['epochs_seen']:.2g}",))


def longer(run: Facts) -> Hint | None:
    if run.got_worse or run.memorises or (run.epochs > FRESH / 1.2 and not run.recipe.train.hours):
        return None
    if run.recipe.train.hours:
        return Hint("a longer run", (f"train.hours={2 * run.recipe.train.hours:.3g}",))
    return Hint("a longer run", (f"train.epochs={min(FRESH, 2 * run.epochs):.2g}",))


def more_text(run: Facts) -> Hint:
    largest = max(run.recipe.text.sources, key=lambda each: each.weight or 0.0, default=None)  # of a mixture
    text, key = (largest.text, f"text.sources.{largest.name}.files") if largest else (run.recipe.text, "text.files")
    names = (name if NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in text.files)
    files = ",".join([*names, "MORE.txt"])
    return Hint("more text, in a file of its own", (f"{key}=[{files}]",))


RULES: tuple[Callable[[Facts], Hint | None], ...] = (
    optimizer, rate, warmup, batch, decay, forgetting, dropout, fewer_pieces, shorter, width, pieces, longer,
)  # fmt: skip


def advise(run: Facts) -> tuple[str, Hint]:
    """The name of the first rule that applies, and its hint; more text where none does."""
    for rule in RULES:
        if hint := rule(run):
            return rule.__name__, hint
    return more_text.__name__, more_text(run)


def of_text(recipe: Recipe, tokens: int, vocab_size: int) -> str:
    """Two lines before a run with a known number of steps: what its `tokens` tokens allow, and a hint."""
    run = Facts(recipe, vocab_size, tokens, 0 if recipe.train.hours else recipe.train.steps)
    held = vocab_size * recipe.model.dim * (1 if recipe.model.tied else 2) / run.parameters
    times = f"{recipe.train.hours:g} h" if recipe.train.hours else f"{run.epochs:.2f} times"
    return (
        f"the text allows: {tokens / 1e6:.2f} M unique tokens, read {times} by {run.parameters / 1e6:.2f} M "
        f"parameters, {held:.0%} of them in the vocabulary\nmost helpful: {advise(run)[1]}"
    )


def of_run(recipe: Recipe, evaluations: list[dict[str, Any]], vocab_size: int = 0) -> str:
    """Two lines after a run: the trend of its `evaluations`, which are in order, and a hint."""
    run = facts_of(recipe, evaluations, vocab_size)
    best, last = run.best, evaluations[-1]
    if run.got_worse:
        said = (
            f"more epochs stopped paying after step {best['step']:,}, epoch {best['epochs_seen']:.2f}: "
            f"{best['bits_per_byte']:.4f} bits per byte there, which is kept, {last['bits_per_byte']:.4f} now"
        )
    elif len(evaluations) > 1:
        said = f"the held-out loss was still falling at the end, epoch {last['epochs_seen']:.2f}"
    else:
        said = f"one evaluation shows no trend, evaluate.every={max(1, last['step'] // 4)} would"
    return f"{said}\n  Next: {advise(run)[1]}"


def facts_of(recipe: Recipe, evaluations: list[dict[str, Any]], vocab_size: int = 0) -> Facts:
    """The facts of a finished run."""
    last = evaluations[-1]
    unique = last["step"] * recipe.train.tokens_per_step / max(last["epochs_seen"], 1e-9)
    return Facts(recipe, vocab_size or recipe.tokenizer.vocab_size, unique, last["step"], evaluations)
