"""What plan expects of a text against what comes of it: python tests/benchmarks/ladder.py ladder|best [TEXT ...]

`ladder`: three rungs, then a run of four times the last one's tokens; its bits per byte against the forecast.
`best`: the best guess for --hours against quickstart's shape, each trained for that time. Texts are wiki-leads,
wiki-leads-fr, wiki-leads-es and python, the sources of the standard library. Minutes a text and core.
"""

import argparse
import sys
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[2]))

import llm
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.insight import cards, ladder

TEXTS = ("wiki-leads", "wiki-leads-fr", "wiki-leads-es", "python")
QUIET = {"every": 10**9}


def sources(folder: Path) -> str:
    """The standard library's own modules, without tests, each a file of `folder`; a pattern that names them."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        name = str(path.relative_to(library)).replace("/", "-")
        if "test" not in name and "site-packages" not in name and (data := path.read_bytes()).strip():
            (folder / name).write_bytes(data.decode("utf-8", "ignore").encode())
    return str(folder / "*.py")


def forecast(name: str, text: str) -> None:
    documents = "files" if name == "python" else "auto"
    climbed = ladder.climb(text, llm.train, print, documents)
    tokens = ladder.REACH * climbed.rungs[-1].tokens
    recipe = ladder.rung(text, ladder.RUNGS[-1][0], tokens, "target", documents)
    expected, found = climbed.expect(tokens), ladder.measured(recipe, llm.train)
    inside = "inside" if expected.low <= found <= expected.high else "OUTSIDE"
    print(f"| {name} | {expected} | {found:.4f} | {expected.bits_per_byte / found - 1:+.1%} | {inside} |", flush=True)


def compare(name: str, text: str, hours: float) -> None:
    best = ladder.propose(text, cards.this_cpu(1), hours)[1].plan.recipe
    plain = load(ROOT / "recipes/quickstart.yaml")
    found = [ladder.measured(timed(each, best.text.files, hours), llm.train) for each in (best, plain)]
    print(f"| {name} | {found[0]:.4f} | {found[1]:.4f} | {found[0] / found[1] - 1:+.1%} |", flush=True)


def timed(recipe: Recipe, files: tuple[str, ...], hours: float) -> Recipe:
    evaluate, checkpoint = replace(recipe.evaluate, **QUIET), replace(recipe.checkpoint, **QUIET)
    changes: dict[str, Any] = {"steps": 0, "tokens": 0, "hours": hours}
    return replace(recipe, run="timed", text=replace(recipe.text, files=files), train=replace(recipe.train, **changes), evaluate=evaluate, checkpoint=checkpoint)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("ladder", "best"))
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--hours", type=float, default=0.05)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.texts:
            text = sources(Path(folder)) if name == "python" else name
            forecast(name, text) if given.what == "ladder" else compare(name, text, given.hours)


if __name__ == "__main__":
    main()
