"""The web page and its content policy, the run's data for it, and the figures for Prometheus."""

import base64
import hashlib
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from llm.inference.fast_decode import SLOTS
from llm.inference.sampling import Sampling
from llm.run_folder import record
from llm.run_folder.loaded_run import LoadedRun
from llm.serving.engine import Engine

PAGE = Path(__file__).with_name("page.html")
BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
MOST_POINTS = 400  # of a curve


@cache
def home() -> tuple[str, str]:
    """The page, and a policy that allows its own inline script and style by their digests, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for kind, block in BLOCK.findall(text):
        digests[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'")
    own = "; ".join(f"{kind}-src {' '.join(found)}" for kind, found in digests.items())
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"default-src 'none'; {own}; {rest}"


def about(run: LoadedRun) -> dict[str, Any]:
    """The run as the page shows it; `curve` has (step, loss) and (step, bits per byte), a few hundred of each."""
    found = record.read(run.folder)
    settings = {
        each.name: {"default": each.default, "least": each.metadata["least"],
                    "most": min(each.metadata["most"], 1e6), "help": each.metadata["help"]}
        for each in fields(Sampling)
    }  # fmt: skip
    return {
        "run": run.folder.name, "checkpoint": run.name, "step": run.checkpoint.step, "chat": run.is_chat,
        "context": run.model.shape.context, "vocabulary": run.tokenizer.vocab_size, "parameters": found.parameters,
        "text": found.text, "state": found.state, "steps": found.step, "planned_steps": found.planned_steps,
        "prompts": [each for each in (found.recipe.evaluate.prompts if found.recipe else ()) if each != "auto"],
        "settings": settings,
        "curve": {
            "loss": _thinned([(line["step"], line["loss"]) for line in found.steps]),
            "bits_per_byte": _thinned([(line["step"], line["bits_per_byte"]) for line in found.evaluations]),
        },
    }  # fmt: skip


def _thinned(points: list[Any]) -> list[Any]:
    """At most MOST_POINTS of them, the last included."""
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::every][::-1]


METRICS = (
    ("generated_tokens", "counter", "Tokens generated."),
    ("prompt_tokens", "counter", "Tokens read of prompts."),
    ("first_token_seconds", "counter", "Seconds from a request to its first token, summed."),
    ("first_tokens", "counter", "Texts that got a first token."),
    ("failures", "counter", "Steps at which the model failed."),
    ("swaps", "counter", "Checkpoints taken after the first."),
)


def prometheus(engine: Engine) -> str:
    """The engine's figures in Prometheus's text format."""
    rows = [(f"onetext_{name}_total", kind, help, engine.counts[name]) for name, kind, help in METRICS]
    rows += [
        ("onetext_running", "gauge", "Texts in slots.", engine.running),
        ("onetext_waiting", "gauge", "Texts in the queue.", len(engine.waiting)),
        ("onetext_slots", "gauge", "Texts that are decoded at once.", SLOTS),
        ("onetext_checkpoints", "gauge", "Checkpoints in memory.", len(engine.checkpoints)),
    ]
    lines = [f"# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}" for name, kind, help, value in rows]
    name = "onetext_requests_total"
    lines.append(f"# HELP {name} Answers by HTTP status.\n# TYPE {name} counter")
    codes = sorted(each for each in engine.counts if each.startswith("status_"))
    lines += [f'{name}{{code="{each.removeprefix("status_")}"}} {engine.counts[each]}' for each in codes]
    return "\n".join(lines) + "\n"
