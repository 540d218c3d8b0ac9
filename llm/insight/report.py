"""The report of one run or several: a single HTML page that is made from their records and asks for no network.

metrics.jsonl alone makes a page. The recipe, the prepared text and the checkpoints add what needs them, each only if it
can be read; what is missing is said on the page.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, StrictUndefined

from llm.base.durations import readable
from llm.base.errors import LLMError, reason
from llm.config.reading import dump
from llm.config.schema import flat
from llm.data import hf_tokenizer
from llm.data.chat_template import prompt_ids
from llm.data.shards import of_run
from llm.data.tokenizer import TextStream, Tokenizer
from llm.insight import baselines
from llm.insight.charts import Chart, Series, chart, compact
from llm.insight.copying import Copying, copying, repetition
from llm.model.cost import size
from llm.run_folder.record import Record

SHOWN = 6  # evaluations whose samples stand side by side
WORST = 8.0  # bits per byte without any knowledge: a run that diverged leaves the charts above them
SHADES = (0.01, 0.05, 0.2, 0.5)  # probabilities that part the shades of a token
TEMPLATE = Path(__file__).with_name("report.html")
UNREADABLE = (LLMError, OSError, LookupError, ValueError, TypeError, ImportError, RuntimeError)

Key = TypeVar("Key")
Value = TypeVar("Value")
Tokens = list[tuple[str, float]]  # the text of each token, and its probability


@dataclass(frozen=True)
class Sample:
    step: int
    text: str
    tokens: list[tuple[str, int, str]]  # text, shade from 0 (unlikely), probability; empty where it is not known
    copied: Copying | None
    repeated: float


@dataclass(frozen=True)
class RunView:
    """The data of one run that the template shows. Rows are texts, ready to be shown."""

    name: str
    colour: int
    state: str
    message: str
    results: list[str]
    plan: list[tuple[str, str, str, str]]
    starts: list[int]
    steps: list[int]
    samples: list[tuple[str, list[Sample | None]]]
    yardsticks: dict[str, float]
    measured: list[str]  # the heads of its evaluations
    evaluations: list[tuple[list[str], bool]]
    events: list[dict[str, Any]]
    recipe: str
    notes: list[str]


RESULTS = ("state", "step", "parameters", "tokens", "epochs", "time", "best bits per byte", "at step",
           "last training loss", "tokens/s", "memory", "device")  # fmt: skip
EVALUATIONS = ("step", "tokens", "epochs", "validation loss", "training loss", "perplexity", "bits per byte")


def page(records: Sequence[Record], *, watch: str = "", nonce: str = "", say: Callable[[str], None] = print) -> str:
    """The report as HTML. With `watch`, a version of what it shows, it asks its server for a newer one."""
    views = [_view(record, colour, say) for colour, record in enumerate(records)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(filter(None, (", ".join(record.name for record in records[:-1]), records[-1].name))),
        runs=views,
        charts=_charts(records, views),
        results=RESULTS,
        differing=differing_keys(records),
        made=time.strftime("%Y-%m-%d %H:%M"),
        watch=watch,
        nonce=nonce,
    )


def differing_keys(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """The keys in which the recipes differ, with the value of each run."""
    recipes = [flat(record.recipe) if record.recipe else {} for record in records]
    values = {name: [_value(recipe.get(name)) for recipe in recipes] for recipe in recipes for name in recipe}
    return [(name, each) for name, each in values.items() if len(set(each)) > 1 and name != "run"]


def _value(value: Any) -> str:
    """A key's value for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _charts(records: Sequence[Record], views: Sequence[RunView]) -> list[Chart]:
    longest = max((line["seconds"] for record in records for line in record.steps if "seconds" in line), default=0.0)
    unit, seconds = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
    yardsticks = [view.yardsticks for view in views]
    levels = yardsticks[0] if all(each == yardsticks[0] for each in yardsticks) else {}

    def tokens(record: Record, step: float) -> float:
        return step * (record.tokens_per_step or 1)

    clocks = {id(each): np.array([(0.0, 0.0), *_points(each, "seconds")]).T.copy() for each in records}

    def clock(record: Record, step: float) -> float:
        return float(np.interp(step, *clocks[id(record)])) / seconds

    def curves(across: Callable[[Record, float], float]) -> list[Series]:
        found = []
        for colour, record in enumerate(records):
            who = f"{record.name} " if len(records) > 1 else ""
            ratio = record.bits_per_nat
            losses = [(across(record, step), loss * ratio) for step, loss in _points(record, "loss")] if ratio else []
            marks = [(across(record, line["step"]), line["bits_per_byte"]) for line in record.evaluations]
            found += [Series(f"{who}training", losses, colour), Series(f"{who}validation", marks, colour, marked=True)]
        return found

    def all_runs(name: str, factor: float = 1.0) -> list[Series]:
        return [
            Series(
                record.name, [(tokens(record, step), value * factor) for step, value in _points(record, name)], colour
            )
            for colour, record in enumerate(records)
        ]

    in_tokens = "tokens" if all(record.tokens_per_step for record in records) else "steps"
    drawn = [
        chart("Bits per byte over tokens", curves(tokens), in_tokens, levels=levels, show_x=compact, most=WORST),
        chart("Bits per byte over time", curves(clock), unit, levels=levels, show_x=compact, most=WORST)
        if longest
        else None,
        chart("Learning rate", all_runs("learning_rate"), in_tokens, show_x=compact, from_zero=True),
        chart("Gradient norm", all_runs("gradient_norm"), in_tokens, show_x=compact, log=True),
        chart("Tokens per second", all_runs("tokens_per_second"), in_tokens, show_x=compact, from_zero=True),
        chart("Memory, in MB", all_runs("memory", 1e-6), in_tokens, show_x=compact, from_zero=True),
    ]
    return [each for each in drawn if each is not None]


def _points(record: Record, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in record.steps if name in line]


def _view(record: Record, colour: int, say: Callable[[str], None]) -> RunView:
    notes = list(record.faults)

    def attempt(otherwise: str, act: Callable[[], dict[Key, Value]]) -> dict[Key, Value]:
        """The result of `act`; nothing, and a note, where it fails."""
        try:
            return act()
        except UNREADABLE as error:
            notes.append(f"{otherwise}: {reason(error)}")
            return {}

    begin = partial(say, f"{record.name}: measuring gzip, xz and a 5-gram on its text, once")
    yardsticks = attempt("no yardsticks", lambda: baselines.of_validation(record.folder, begin))
    steps = _chosen(sorted({line["step"] for line in record.samples}))
    told = {(line["step"], line["prompt"]): line["sample"] for line in record.samples if line["step"] in steps}
    copied = attempt("samples not searched for copies", lambda: _copied(record.folder, tuple(told.values())))
    tokens: dict[tuple[int, str], Tokens] = {}
    for step in (step for step in steps if (record.folder / f"checkpoints/step-{step:06d}").is_dir()):
        pairs = tuple((prompt, text) for (at, prompt), text in told.items() if at == step)
        tokens |= attempt("samples not coloured", partial(_scored, record.folder, step, pairs))

    def sample(step: int, prompt: str) -> Sample | None:
        if (step, prompt) not in told:
            return None
        text = told[step, prompt]
        shaded = [(each, sum(p >= at for at in SHADES), f"{p:.2g}") for each, p in tokens.get((step, prompt), [])]
        return Sample(step, text, shaded, copied.get(text), repetition(text))

    prompts = dict.fromkeys(prompt for _, prompt in told)
    return RunView(
        name=record.name,
        colour=colour % 6,
        state=record.state,
        message=str(record.status.get("message", "")) if record.status.get("status") else "",
        results=_results(record),
        plan=_plan(record),
        starts=[line["step"] for line in record.starts],
        steps=steps,
        samples=[(prompt, [sample(step, prompt) for step in steps]) for prompt in prompts],
        yardsticks=yardsticks,
        measured=[*EVALUATIONS, *_texts_of(record)],
        evaluations=_evaluations(record),
        events=record.events,
        recipe=dump(record.recipe) if record.recipe else "",
        notes=list(dict.fromkeys(notes)),
    )


def _chosen(steps: list[int]) -> list[int]:
    """SHOWN of the steps: the first, the last, and others evenly between them."""
    last = len(steps) - 1
    return [steps[at] for at in sorted({round(last * n / (SHOWN - 1)) for n in range(SHOWN)})] if steps else []


def _results(record: Record) -> list[str]:
    last, best = record.steps[-1] if record.steps else {}, record.best
    rates = [rate for _, rate in _points(record, "tokens_per_second")]
    device, precision = (record.fact(name) for name in ("device", "precision"))
    return [
        record.state,
        _number(record.step) + (f" of {record.planned_steps:,}" if record.planned_steps else ""),
        f"{record.parameters / 1e6:.2f} M" if record.parameters else "-",
        compact(record.step * record.tokens_per_step) if record.tokens_per_step else "-",
        _number(last.get("epoch"), ".2f"),
        readable(last["seconds"]) if "seconds" in last else "-",
        _number(best["bits_per_byte"] if best else None, ".4f"),
        _number(best["step"] if best else None),
        _number(last.get("loss"), ".4f"),
        _number(statistics.median_high(rates) if rates else None, ",.0f"),
        size(last["memory"]) if "memory" in last else "-",
        f"{device}, {precision}" if device else "-",
    ]


def _plan(record: Record) -> list[tuple[str, str, str, str]]:
    """The first start's planned figures, the actual ones by now, and their ratio."""
    if not record.starts or not record.steps:
        return []
    first, last = record.starts[0], record.steps[-1]
    planned, done = first["planned_steps"], record.step
    per_step = first.get("tokens_per_step", 0)
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("steps", planned, done, lambda n: f"{n:,.0f}"),
        ("tokens", planned * per_step, done * per_step, compact),
        ("time", first.get("planned_seconds", 0.0), last.get("seconds", 0.0), readable),
    ]
    if first.get("unique_tokens"):
        epochs = last.get("epoch", 0.0)
        rows.append(("epochs", epochs / done * planned if done else 0.0, epochs, lambda n: f"{n:.2f}"))
    return [(name, show(a), show(b), f"{b / a:.0%}" if a else "-") for name, a, b, show in rows]


def _texts_of(record: Record) -> list[str]:
    """The sources of a mixture, and evaluate.also, whose bits per byte were measured too."""
    sources = dict.fromkeys(name for line in record.evaluations for name in line.get("sources", {}))
    also = any("also_bits_per_byte" in line for line in record.evaluations)
    return [*sources, *(["evaluate.also"] if also else [])]


def _evaluations(record: Record) -> list[tuple[list[str], bool]]:
    best, texts = record.best, _texts_of(record)
    measured = [
        (line, {"evaluate.also": line.get("also_bits_per_byte"), **line.get("sources", {})})
        for line in record.evaluations
    ]
    return [
        (
            [
                _number(line["step"]),
                compact(line["step"] * record.tokens_per_step) if record.tokens_per_step else "-",
                _number(line.get("epochs_seen"), ".2f"),
                _number(line["val_loss"], ".4f"),
                _number(line.get("train_loss"), ".4f"),
                _number(math.exp(min(line["val_loss"], 700)), ",.2f"),
                _number(line["bits_per_byte"], ".4f"),
                *(_number(each.get(name), ".4f") for name in texts),
            ],
            line is best,
        )
        for line, each in measured
    ]


def _number(value: float | None, form: str = ",") -> str:
    return "-" if value is None else format(value, form)


@lru_cache(maxsize=16)
def _copied(folder: Path, texts: tuple[str, ...]) -> dict[str, Copying]:
    tokenizer = hf_tokenizer.load(folder / "tokenizer")
    return dict(zip(texts, copying(texts, of_run(folder).train, tokenizer), strict=True))


@lru_cache(maxsize=16)
def _scored(folder: Path, step: int, pairs: tuple[tuple[str, str], ...]) -> dict[tuple[int, str], Tokens]:
    """By step and prompt: the tokens of each sample, with their probability under the checkpoint that wrote them."""
    import torch

    from llm.run_folder.loaded_run import open_run

    run = open_run(str(folder / f"step-{step:06d}"), torch.device("cpu"))
    context, found = run.recipe.model.context, {}

    def last(windows: list[list[int]], ids: list[int]) -> list[float]:
        """The probability of each of the `ids` after its window; windows are of one length."""
        logits = run.model.logits(torch.tensor(windows))[:, -1].float()
        return logits.softmax(-1)[torch.arange(len(ids)), ids].tolist()

    for prompt, text in pairs:
        before = prompt_ids(run.tokenizer, prompt, chat=run.is_chat)
        ids = [*before, *run.tokenizer.encode(text)]
        after = range(len(before), len(ids))
        with torch.no_grad():
            first = run.model.logits(torch.tensor([ids[:context]]))[0].float().softmax(-1)
            chosen = [first[at - 1, ids[at]].item() for at in after if at <= context]
            if later := [at for at in after if at > context]:  # each sees the tokens that it saw as it was written
                chosen += last([ids[at - context : at] for at in later], [ids[at] for at in later])
        found[step, prompt] = _whole_characters(run.tokenizer, ids[len(before) :], chosen)
    return found


def _whole_characters(tokenizer: Tokenizer, ids: list[int], probabilities: list[float]) -> Tokens:
    """The text of each token; those that hold only parts of a character are one, with their joint probability."""
    stream, joint, found = TextStream(tokenizer), 1.0, []
    for id, probability in zip(ids, probabilities, strict=True):
        joint *= probability
        if text := stream.feed(id):
            found.append((text, joint))
            joint = 1.0
    return [*found, (stream.flush(), joint)]
