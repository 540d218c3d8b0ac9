"""Bits per byte to expect of a model before it is trained: a law fitted to measured runs, a ladder, and proposals.

The law has Chinchilla's form in bits per byte (Hoffmann et al., 2022), with repeated text discounted as by Muennighoff
et al. (2023): E + A parameters^-a + B (text read + C)^-b. It was fitted to the runs of recipes/experiments.md and to
one published figure. Three tiny runs on a text, a ladder, correct it for that text.
"""

import json
import math
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llm.base.durations import readable
from llm.base.errors import RecipeError, TextError
from llm.config.reading import load
from llm.config.resolving import MANY_EPOCHS, resolve
from llm.config.schema import Checkpoint, Evaluate, Model, Recipe, Text, Tokenizer, Train
from llm.data.sources import WIKI, Source, sources_of, wiki_documents
from llm.insight import planning
from llm.insight.cards import Device
from llm.model import cost

# E, A and B in bits per byte of the packaged English text; parameters in millions, text in megabytes. Nine runs with
# these defaults (0.3 to 13 M parameters, 0.06 to 6.8 M tokens; 4,096 and 16,384 pieces) and 124 M parameters on 0.73
# billion tokens of FineWeb (3.28 nats a token, github.com/KellerJordan/modded-nanogpt) lie within 4 % of it.
FLOOR, SIZE, TEXT = 0.9, 0.264, 1.063
SIZE_POWER, TEXT_POWER, TEXT_OFFSET = 0.2, 0.5, 0.5
PIECES_POWER = 0.2  # text counts by (vocabulary / 4,096) to this power: more pieces learn more from a byte
REUSE = 4.0  # as many times the text, all further epochs together are worth
WITHIN, UNKNOWN_TEXT, PER_DECADE = 0.04, 0.10, 0.04  # half widths: of the law, of another text, per tenfold of tokens
MEASURED = 9.2e6  # most tokens of a run that was measured
ENGLISH_PIECE = 3.44  # bytes per token of the packaged English text at 4,096 pieces
ENGLISH_GZIP = 2.918  # bits per byte of the packaged English text, in pieces of SAMPLE bytes
SAMPLE, SAMPLES = 1 << 18, 8

RUNGS = ((48, 64_000), (64, 128_000), (80, 256_000))  # width and tokens of a ladder's runs
REACH = 4  # as many times the tokens of the last rung, the power law through the rungs is trusted
RUNG_STEP, RUNG_CONTEXT, RUNG_PIECES = 1024, 256, 4096
LADDER_WITHIN = 0.03


@dataclass(frozen=True)
class Expectation:
    """Bits per byte of held-out text, with an interval that should hold nine of ten runs."""

    bits_per_byte: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.3f} bits per byte ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Law:
    """The law for one text: the table's times `factor`, in an interval of `within` (a fraction) where it was measured.

    `tokens` are those of the longest run that it was measured on.
    """

    factor: float
    within: float
    tokens: float

    def expect(self, parameters: int, vocab_size: int, tokens: float, text_tokens: float) -> Expectation:
        """For a model of so many parameters that reads `tokens` tokens of a text that has `text_tokens`."""
        bits = self.factor * table(parameters, vocab_size, tokens, text_tokens)
        spread = self.within + PER_DECADE * max(0.0, math.log10(tokens / self.tokens))
        return Expectation(bits, bits * (1 - spread), bits * (1 + spread))


@dataclass(frozen=True)
class Rung:
    """One run of a ladder. `bits_per_byte` is of held-out text at its end."""

    recipe: Recipe
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class Ladder:
    """Three tiny runs on one text, and a power law in tokens: log bits = intercept + slope log tokens."""

    rungs: tuple[Rung, ...]
    slope: float
    intercept: float
    text_tokens: int

    def expect(self, tokens: float) -> Expectation:
        """For the last rung's shape and `tokens` tokens, at most REACH times the last rung's."""
        bits = math.exp(self.intercept + self.slope * math.log(tokens))
        missed = (math.log(each.bits_per_byte) - self.slope * math.log(each.tokens) for each in self.rungs)
        off = max(abs(each - self.intercept) for each in missed)
        spread = LADDER_WITHIN + 2 * off
        return Expectation(bits, bits * (1 - spread), bits * (1 + spread))

    @property
    def law(self) -> Law:
        """The table's law, moved so that it meets the ladder at its reach."""
        last, tokens = self.rungs[-1], REACH * self.rungs[-1].tokens
        size = cost.parameters(last.recipe.model, RUNG_PIECES)
        expected = self.expect(tokens)
        factor = expected.bits_per_byte / table(size, RUNG_PIECES, tokens, self.text_tokens)
        return Law(factor, WITHIN + (expected.high / expected.bits_per_byte - 1) / 2, tokens)


def table(parameters: int, vocab_size: int, tokens: float, text_tokens: float) -> float:
    """Bits per byte by the law on the packaged English text."""
    unique = min(tokens, text_tokens or tokens)
    again = tokens / unique - 1
    worth = unique * (1 + REUSE * (1 - math.exp(-again / REUSE)))
    megabytes = worth * planning.bytes_per_token(vocab_size) / planning.bytes_per_token(4096) * ENGLISH_PIECE / 1e6
    read = megabytes * (vocab_size / 4096) ** PIECES_POWER
    return FLOOR + SIZE * (parameters / 1e6) ** -SIZE_POWER + TEXT * (read + TEXT_OFFSET) ** -TEXT_POWER


def law_of(text: str) -> Law:
    """The table's law for a text that nothing was trained on: moved, half of the way, by how well gzip compresses it.

    Gzip says little about what a model will reach, so the interval is wide; TextError for a text that is not there.
    """
    pieces = [each for each in _pieces(text) if each]
    if not pieces:
        raise TextError(f"{text[:80]}: there is nothing in it: put your text there")
    ratio = sum(8 * len(zlib.compress(each, 6)) for each in pieces) / sum(map(len, pieces)) / ENGLISH_GZIP
    within = WITHIN if text == "wiki-leads" else UNKNOWN_TEXT + abs(math.log(ratio)) / 2
    return Law(math.sqrt(ratio) if text != "wiki-leads" else 1.0, within, MEASURED)


def _pieces(text: str) -> Iterator[bytes]:
    """Pieces of a text at equal distances, as they are on disk (a .gz file's: as text)."""
    if text in WIKI:
        whole = b"".join(wiki_documents(WIKI[text]))
        yield from (whole[at : at + SAMPLE] for at in range(0, len(whole), -(-len(whole) // SAMPLES)))
        return
    for source in sources_of(Text(files=(text,))):
        if source.path is None or source.size is None:  # compressed or of the hub: its beginning
            yield _beginning(source)
            continue
        with source.path.open("rb") as file:
            for at in range(0, source.size, max(1, -(-source.size // SAMPLES))):
                file.seek(at)
                yield file.read(SAMPLE)


def _beginning(source: Source) -> bytes:
    """The first SAMPLE bytes of a source, over as many of its rows as that takes."""
    text = bytearray()
    for chunk in chain.from_iterable(source.texts(Counter())):
        text += chunk
        if len(text) >= SAMPLE:
            break
    return bytes(text[:SAMPLE])


# ---------------------------------------------------------------------------------------------- ladder


def rung(text: str, width: int, tokens: int, run: str, documents: str = "auto") -> Recipe:
    """The recipe of one run of a ladder: four blocks, `width` wide, evaluated once at its end."""
    recipe = _recipe(run, text, Model(dim=width, layers=4, heads=2, context=RUNG_CONTEXT), RUNG_PIECES, RUNG_STEP)
    return resolve(
        replace(
            recipe,
            text=replace(recipe.text, documents=documents),
            train=replace(recipe.train, steps=0, tokens=tokens),
            evaluate=Evaluate(every=10**9),
            checkpoint=Checkpoint(every=10**9),
        )
    )


def climb(
    text: str, train: Callable[..., Any], say: Callable[[str], None] = lambda line: None, documents: str = "auto"
) -> Ladder:
    """Train the rungs on `text` in temporary run folders and fit a power law. Takes minutes on a CPU.

    `train(recipe, runs=..., on_log=...)` is llm.train. TextError for a text that is too small for the rungs.
    """
    rungs = []
    for width, tokens in RUNGS:
        recipe = rung(text, width, tokens, f"ladder-{width}", documents)
        rungs.append(Rung(recipe, tokens, bits := measured(recipe, train)))
        say(f"ladder: {width} wide, {tokens:,} tokens: {bits:.4f} bits per byte")
    return fitted(rungs, planning.text_tokens(recipe)[0])


def measured(recipe: Recipe, train: Callable[..., Any]) -> float:
    """Bits per byte of held-out text at the end of a run in a temporary folder."""
    found: list[float] = []

    def look(line: dict[str, Any]) -> None:
        if line.get("bits_per_byte") is not None:
            found.append(line["bits_per_byte"])

    planning.train_for_figures(recipe, train, look)
    if not found:
        raise TextError(f"{', '.join(recipe.text.files)}: nothing of it is held out, so nothing can be measured")
    return found[-1]


def fitted(rungs: list[Rung], text_tokens: int) -> Ladder:
    """The ladder through these rungs, by least squares of log bits per byte over log tokens."""
    x, y = (np.log([getattr(each, name) for each in rungs]) for name in ("tokens", "bits_per_byte"))
    slope, intercept = np.polyfit(x, y, 1)
    return Ladder(tuple(rungs), float(slope), float(intercept), text_tokens)


# ---------------------------------------------------------------------------------------------- proposals

WIDTHS = {  # layers, heads, heads of keys and values, context
    64: (4, 2, 2, 256), 96: (4, 3, 3, 256), 128: (4, 2, 2, 256), 192: (4, 3, 3, 256), 256: (6, 4, 4, 256),
    384: (8, 6, 6, 512), 512: (10, 8, 4, 1024), 640: (12, 10, 5, 1024), 768: (16, 12, 4, 1024), 1024: (28, 16, 4, 1024),
}  # fmt: skip
VOCABULARIES = (4096, 8192, 16384, 32768)
MOST_EPOCHS = 20  # more gained nothing that was measured
MOST_WEIGHTS = 5  # parameters for each token of the text: 3.5 were measured
MOST_PIECES = 0.75  # of the weights in the vocabulary: as many were measured
NEARLY = 1.03  # the largest proposal is expected to end at most so much above the best
USED = 0.93  # of the time: the rest goes into evaluations and checkpoints
SAMPLED = 4096  # pieces that the softmax covers on a CPU, where more took much time and gained nothing
MEAN = 0.985  # bits per byte of the mean of a run and its branch, over the run's own (recipes/experiments.md)


@dataclass(frozen=True)
class Proposal:
    """A recipe for a text and a time on a device, and what to expect of it."""

    name: str  # safe, best, largest or branch
    plan: planning.Plan
    expectation: Expectation


def propose(text: str, device: Device, hours: float, law: Law | None = None) -> list[Proposal]:
    """Recipes for `text`: safe (half the best one's size at most, in half the time), best, largest, perhaps a branch.

    A branch is proposed where the text leaves time to train the second half of the best run again; its expectation is
    that of the mean of the two runs. TextError if the text is not there, RecipeError where the device's speed is
    unknown or nothing fits.
    """
    law = law or law_of(text)
    if not (size := planning.text_bytes(_recipe("best", text, Model(), VOCABULARIES[0], 8 * Model().context))):
        raise RecipeError(f"--text {text[:80]}: its size is not known here: name a file or a folder")
    found = [each for shape in _shapes() if (each := _candidate(text, device, hours, law, *shape))]
    if not found:
        smallest = _recipe("best", text, *next(_shapes()), 8 * Model().context)
        least = cost.parameters(smallest.model, smallest.tokenizer.vocab_size)
        if least > MOST_WEIGHTS * planning.text_tokens(smallest)[0]:
            fault = (
                f"{size / 1e6:.3g} MB are too little for the smallest model proposed, {least / 1e6:.2f} M parameters"
            )
            mend = f"give more text, or train recipes/quickstart.yaml with {shlex.quote(f'text.files={text}')}"
            raise RecipeError(f"--text {text[:80]}: {fault}: {mend}")
        raise RecipeError(f"no model for {text[:80]} fits the memory of {device.name}: name a card with more")
    best = min(found, key=_bits)
    small = [each for each in found if _size(each) <= _size(best) / 2] or [best]
    halves = [_candidate(text, device, hours / 2, law, each.plan.recipe.model, _vocabulary(each)) for each in small]
    large = [each for each in found if _size(each) > _size(best) and _bits(each) <= NEARLY * _bits(best)]
    safe = min((each for each in halves if each), key=_bits, default=best)
    named = {"safe": safe, "best": best, "largest": max(large, key=_size, default=best)}
    kept = _keeping(best)
    branch = _branch(kept)
    if best.plan.seconds + branch.plan.seconds <= hours * 3600:
        named |= {"best": kept, "branch": branch}
    return [replace(each, name=name) for name, each in named.items()]


def _branch(best: Proposal) -> Proposal:
    """The second half of the best proposal again, on other windows."""
    recipe, bits = best.plan.recipe, best.expectation
    half = 2 * recipe.checkpoint.every  # of the four checkpoints of a proposal
    plan = replace(best.plan, recipe=replace(recipe, seed=recipe.seed + 1, from_=f"best/step-{half}"))
    return Proposal("branch", plan, Expectation(*(MEAN * each for each in (bits.bits_per_byte, bits.low, bits.high))))


def _keeping(best: Proposal) -> Proposal:
    """The best proposal, keeping the checkpoints of its four quarters and of its end, so that a branch can start."""
    recipe = best.plan.recipe
    return replace(best, plan=replace(best.plan, recipe=replace(recipe, checkpoint=replace(recipe.checkpoint, keep=5))))


def _bits(each: Proposal) -> float:
    return each.expectation.bits_per_byte


def _size(each: Proposal) -> int:
    return sum(each.plan.parameters.values())


def _vocabulary(each: Proposal) -> int:
    return each.plan.recipe.tokenizer.vocab_size


def _shapes() -> Iterator[tuple[Model, int]]:
    for width, (layers, heads, kv_heads, context) in WIDTHS.items():
        for vocab_size in VOCABULARIES:
            yield Model(dim=width, layers=layers, heads=heads, kv_heads=kv_heads, context=context), vocab_size


def _candidate(text: str, device: Device, hours: float, law: Law, shape: Model, vocab_size: int) -> Proposal | None:
    """The best that this shape can do in the time; None if it does not fit the memory or the text."""
    recipe = _recipe("best", text, shape, vocab_size, 8 * shape.context)
    if not device.cuda and vocab_size > SAMPLED:
        recipe = replace(recipe, train=replace(recipe.train, sampled_softmax=SAMPLED))
    if not (speed := planning.tabulated_speed(recipe, device)):
        raise RecipeError(f"the speed of {device.name} is not in the table: name it by --gpu, with --memory if need be")
    unique = planning.text_tokens(recipe)[0]
    tokens = min(hours * 3600 * USED * speed, MOST_EPOCHS * unique)
    per_step = _tokens_per_step(tokens, shape.context)
    train = replace(
        recipe.train,
        steps=0,
        tokens_per_step=per_step,
        tokens=max(per_step, int(tokens)),
        weight_decay="auto",
        warmup=min(100, int(tokens / per_step / 20)),
    )
    model = replace(recipe.model, dropout="auto")
    every = max(1, int(tokens / per_step / 4))
    evaluate, kept = replace(recipe.evaluate, every=every), Checkpoint(every=every)
    recipe = replace(recipe, model=model, train=train, evaluate=evaluate, checkpoint=kept)
    plan = planning.plan(resolve(recipe), device)
    size = sum(plan.parameters.values())
    if not plan.fits or size > MOST_WEIGHTS * unique or plan.parameters["embeddings"] > MOST_PIECES * size:
        return None
    return Proposal("best", plan, law.expect(size, vocab_size, tokens, unique))


def _tokens_per_step(tokens: float, context: int) -> int:
    """1,024 for half a million tokens, growing with their number to the power 0.4: a power of two of windows."""
    return context * 2 ** max(2, round(math.log2(max(1.0, 1024 * (tokens / 5e5) ** 0.4 / context))))


def _recipe(run: str, text: str, shape: Model, vocab_size: int, per_step: int) -> Recipe:
    """A recipe with the settings that won in recipes/README.md."""
    return resolve(
        Recipe(
            run=run,
            text=Text(files=(text,)),
            tokenizer=Tokenizer(vocabulary=vocab_size),
            model=shape,
            train=Train(tokens=per_step, tokens_per_step=per_step, decay=0.6),
            evaluate=Evaluate(prompts=("auto",)),
        )
    )


def free_paths(text: str) -> dict[str, Path]:
    """The files of the recipes by name, whether proposed or not. RecipeError if one of them is there already."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(text).name.split(".")[0])[:80].strip("-") or "text"
    stem = f"my-{stem}" if f"{stem}-".startswith("step-") else stem  # RUN/step-N is a checkpoint
    paths = {name: Path(f"{stem}-{name}.yaml") for name in ABOUT}
    if there := [str(path) for path in paths.values() if path.exists()]:
        raise RecipeError(f"there already: {', '.join(there)}: move them away, nothing was written")
    return paths


def write_proposals(text: str, device: Device, hours: float, law: Law | None = None) -> list[str]:
    """Write the recipes as NAME-safe.yaml, NAME-best.yaml and so on into this folder; lines on each.

    RecipeError if one of these files is there already, in which case none is written.
    """
    paths, said, proposals = free_paths(text), [], propose(text, device, hours, law)
    for each in proposals:
        path = paths[each.name]
        words = described(
            replace(each, plan=replace(each.plan, recipe=replace(each.plan.recipe, run=path.stem))), hours
        )
        with path.open("x", encoding="utf-8") as file:
            file.write(words)
        load(path)  # what was written can be trained
        said.append(f"{path}: {_size(each) / 1e6:.2f} M parameters, {each.plan.tokens / 1e6:,.2f} M tokens, about "
                    f"{readable(each.plan.seconds)}: {each.expectation}")  # fmt: skip
    if max(each.plan.seconds for each in proposals) < hours * 3600 / 2:
        said.append(f"the text is the limit: reading it more than {MOST_EPOCHS} times gained nothing that was measured")
    said.append(f"train the best guess: python launch/train.py {paths['best']}")
    if proposals[-1].name == "branch":
        names = f"{paths['best'].stem} --mean {paths['branch'].stem}"
        said.append(f"then {paths['branch']}; their mean should be better than either: python -m llm.evaluate {names}")
    return said


ABOUT = {
    "safe": "half the time and a smaller model: what surely ends well",
    "best": "the best guess for this time",
    "largest": "the largest model that is expected to come near the best one: it gains if you train longer",
    "branch": "after the best guess: trains its second half again; the mean of both runs should be better than either",
}


def described(each: Proposal, hours: float) -> str:
    """The proposal as a commented recipe."""
    plan, recipe = each.plan, each.plan.recipe
    model, train = recipe.model, recipe.train
    estimated = ", by its size" if plan.text_is_estimated else ""
    seconds = readable(plan.seconds)
    sampled = f"  sampled_softmax: {train.sampled_softmax}  # pieces\n" if train.sampled_softmax else ""
    # STEM-branch begins from STEM-best/step-N.
    begin = f"from: {recipe.run.removesuffix('branch')}{recipe.from_}\n" if recipe.from_ else ""
    tokens = train.steps * train.tokens_per_step
    name = json.dumps(recipe.text.files[0], ensure_ascii=False)  # but for what YAML does not take as it is
    name = re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda odd: f"\\u{ord(odd[0]):04x}", name)
    return f"""\
# {ABOUT[each.name]}; proposed for {hours:g} h on {plan.device.name}
# expected: {each.expectation} of held-out text
# about {seconds}, {cost.size(plan.memory.peak)} at the peak of a step
run: {recipe.run}
seed: {recipe.seed}
{begin}
text:
  files: [{name}]

tokenizer:
  vocabulary: {recipe.tokenizer.vocab_size}  # pieces: {plan.parameters["embeddings"] / _size(each):.0%} of the weights

model:  # {_size(each) / 1e6:.2f} M parameters
  dim: {model.dim}
  layers: {model.layers}
  heads: {model.heads}
  kv_heads: {model.kv_heads}
  context: {model.context}  # tokens
  dropout: auto  # none up to {MANY_EPOCHS} epochs

train:
  tokens: {tokens}  # {tokens / plan.text_tokens:.2f} epochs of {plan.text_tokens / 1e6:,.2f} M tokens{estimated}
  tokens_per_step: {train.tokens_per_step}  # {train.steps:,} steps
{sampled}  optimizer: muon
  learning_rate: {train.learning_rate:g}
  warmup: {train.warmup}  # steps
  decay: 60%  # of the run, at its end
  weight_decay: auto  # by the number of epochs

evaluate:
  every: {recipe.evaluate.every}  # steps
  prompts: auto

checkpoint:
  every: {recipe.checkpoint.every}  # steps; {cost.size(plan.checkpoint_bytes)} each
  keep: {recipe.checkpoint.keep}

machine:
  compile: {str(recipe.machine.compile).lower()}
"""
