"""Each rule of llm/insight/hints.py against a run that it advises on: python tests/benchmarks/advice.py [ROW ...]

A row trains a small model with one thing wrong, asks for the advice, applies its overrides as they are, and trains again:
bits per byte of the same held-out text at the end of both runs, the tokens that they read, and how many times as much work the
second is. One thread, half an hour; prints Markdown.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[2]))

import llm
from llm.data.sources import wiki_documents
from llm.insight import hints
from llm.model import cost
from llm.prepare import MARKER
from tests.tiny import with_last_length

BASE = (
    "tokenizer.vocabulary=4096 model.dim=96 model.heads=3 model.layers=4 model.context=128 train.tokens=60k "
    "text.files=[third.txt] train.tokens_per_step=512 train.warmup=6 text.validation=4% evaluate.prompts=[] machine.threads=1 "
    "checkpoint.every=1000000 evaluate.every=1000000 machine.precision=fp32"
)
PARTS = {"third": 3, "hundredth": 100, "tiny": 400, "MORE": 7}  # one in so many of the packaged articles, as a text


@dataclass(frozen=True)
class Row:
    """`wrong`: overrides of BASE that the advice should take back by the rule `rule`."""

    name: str
    rule: str
    wrong: str


SMALL = "text.files=[hundredth.txt] text.validation=25% tokenizer.vocabulary=1024 evaluate.every=40"
TINY = "text.files=[tiny.txt] text.validation=25% tokenizer.vocabulary=400 evaluate.every=15"
ROWS = [
    Row("AdamW at 3e-4", "optimizer", "train.optimizer=adamw train.learning_rate=3e-4"),
    Row("too high a rate", "rate", "train.learning_rate=0.3"),
    Row("too low a rate", "rate", "train.learning_rate=0.002"),
    Row("too few steps: 8,192 tokens each", "batch", "train.tokens_per_step=8192 train.warmup=0"),
    Row("warm-up over 40 % of the run", "warmup", "train.warmup=46"),
    Row("a constant rate", "decay", "train.decay=0"),
    Row("no weight decay in six epochs", "forgetting", f"{SMALL} train.epochs=6 train.weight_decay=0"),
    Row("weight decay 10 in six epochs", "forgetting", f"{SMALL} train.epochs=6 train.weight_decay=10"),
    Row("dropout without need", "dropout", "model.dropout=0.2"),
    Row("too few pieces: 512", "pieces", "tokenizer.vocabulary=512"),
    Row("too few pieces: 2,048", "pieces", "tokenizer.vocabulary=2048"),
    Row("too many pieces: 8,192", "fewer_pieces", f"{SMALL} tokenizer.vocabulary=8192 train.epochs=6 train.weight_decay=auto"),
    Row("too narrow: 16", "width", "model.dim=16 model.heads=1 tokenizer.vocabulary=1024 train.tokens=140k"),
    Row("too large: 256 wide, 8 blocks", "width", "model.dim=256 model.heads=4 model.layers=8 train.tokens=20k"),
    Row("too short", "longer", "train.tokens=30k tokenizer.vocabulary=8192"),
    Row("too many epochs: 20", "shorter", f"{TINY} train.epochs=20 train.weight_decay=2.9epochs"),
    Row("too little text", "more_text", f"{SMALL} train.tokens=90k evaluate.also=[hundredth.txt]"),
]  # fmt: skip


def write_parts(folder: Path) -> None:
    articles = list(wiki_documents("en-us"))
    for name, part in PARTS.items():
        (folder / f"{name}.txt").write_bytes(f"{MARKER}\n".encode().join(articles[part // 2 :: part]))


def trained(overrides: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """The recipe as the run understood it, and its evaluations."""
    found: list[dict[str, Any]] = []
    recipe = llm.load_recipe("quickstart", with_last_length(overrides))
    with tempfile.TemporaryDirectory() as runs:
        done = llm.train(recipe, runs=runs, on_log=lambda line: found.append(line))
    return done.recipe, [line for line in found if line.get("val_loss") is not None]


def bits(evaluations: list[dict[str, Any]]) -> float:
    """Bits per byte at the end of the run, of the text that both runs of a row hold out."""
    last = evaluations[-1]
    return float(last.get("also_bits_per_byte", last["bits_per_byte"]))


def work(recipe: Any) -> float:
    """Operations of the whole run's products, by formula."""
    tokens = recipe.train.steps * recipe.train.tokens_per_step
    return tokens * cost.flops_per_token(recipe.model, recipe.tokenizer.vocabulary)


def row(each: Row, seed: int) -> str:
    wrong = [*BASE.split(), *each.wrong.split(), f"seed={seed}"]
    recipe, before = trained(wrong)
    rule, hint = hints.advise(hints.facts_of(recipe, before))
    changed, after = trained([*wrong, *hint.change])
    verdict = "" if rule == each.rule else f", not {each.rule}"
    verdict += "" if bits(after) < bits(before) else ", DOES NOT HOLD"
    read = [f"{of.train.steps * of.train.tokens_per_step / 1e3:,.0f} k" for of in (recipe, changed)]
    tokens = read[0] if read[0] == read[1] else f"{read[0]}, {read[1]}"
    return (
        f"| {each.name} | {rule}{verdict} | `{' '.join(hint.change)}` | {bits(before):.4f} | {bits(after):.4f} | "
        f"{bits(after) / bits(before) - 1:+.1%} | {tokens} | {work(changed) / work(recipe):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="words of the rows to run; all by default")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    table = sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_parts(Path(folder))
        print("| run | rule | change that it names | before | after | | tokens | work |\n" + "|---" * 8 + "|")
        for each in ROWS:
            if not given.rows or any(word in each.name for word in given.rows):
                with Path("log").open("a") as log:
                    sys.stdout = log
                    try:
                        line = row(each, given.seed)
                    finally:
                        sys.stdout = table
                print(line)


if __name__ == "__main__":
    main()
