"""The console command `onetext`: `onetext train RECIPE`, and `onetext NAME` for each `python -m llm.NAME`."""

import difflib
import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from llm.base.command import Parser
from llm.base.errors import RecipeError, RefusedError, run

COMMANDS = (
    "plan", "inspect", "prepare", "sample", "chat", "serve", "evaluate", "export", "verify", "show", "runs", "report",
)  # fmt: skip


def train(arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Train one recipe: the command of launch/train.py and of `onetext train`."""
    parser = Parser(
        "train",
        "Train one recipe, from its text to a model. To resume a stopped run, use the same command.",
        prog=prog,
        epilog="example: python launch/train.py recipes/quickstart.yaml train.tokens=200k run=try",
    )
    parser.add_recipe()
    parser.add_argument("--check", action="store_true", help="only check the recipe and print it, defaults filled in")
    given = parser.parse_args(arguments)
    from llm.config.packaged import load_recipe
    from llm.config.reading import dump

    recipe = load_recipe(given.recipe, given.overrides)  # refused before the slow imports, if at all
    if given.check:
        print(dump(recipe), end="")
        return

    from llm.data import hf_tokenizer
    from llm.data.prompts import example, quoted
    from llm.data.shards import of_run
    from llm.distributed.process import rank, say
    from llm.interop.pretrained import ready
    from llm.training.session import train as train_run

    folder = train_run(recipe, partial(ready, say=say), runs=_runs_of(given.recipe, recipe.run))
    if rank() != 0:
        return
    try:
        shards = of_run(folder)
    except RefusedError:  # damaged while the run went on, which its record says
        say(f"Saved in {folder}.")
        return
    name = recipe.run if folder.parent == Path("runs") else shlex.quote(str(folder))
    if shards.is_chat:
        attempt = f"python -m llm.chat {name}"
    else:
        tokenizer = hf_tokenizer.load(folder / "tokenizer")
        prompt = quoted(example(load_recipe(folder / "recipe.yaml"), tokenizer, shards))
        attempt = f"python -m llm.sample {name} --prompt {prompt}"
    say(f"Saved in {folder}. Try it:\n  {attempt}")


def _runs_of(recipe: Path, run: str) -> Path:
    """The folder of runs: that of the run whose own recipe.yaml is named, from anywhere, otherwise runs/ here."""
    folder = Path.cwd() if recipe.parent == Path() else recipe.parent
    return folder.parent if folder.name == run and (folder / "identity.json").is_file() else Path("runs")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "train":
        run(lambda: train(sys.argv[2:], "onetext train"))
    if name in COMMANDS:
        run(lambda: import_module(f"llm.{name}").main(sys.argv[2:]))
    if name not in ("-h", "--help"):
        run(partial(_refuse, name))
    print(f"usage: onetext {{train,{','.join(COMMANDS)}}} ...\n\n`onetext NAME --help` shows the arguments of NAME.")


def _refuse(name: str) -> NoReturn:
    near = difflib.get_close_matches(name, ("train", *COMMANDS), 1)
    meant = f"did you mean {near[0]}?" if near else "`onetext --help` lists the commands"
    raise RecipeError(f"onetext {name}: no such command; {meant}")
