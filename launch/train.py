"""Train one recipe: `python launch/train.py RECIPE`, or the same script under `accelerate launch` or torchrun."""

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    from llm.base.errors import run
    from llm.config.reading import dump, load
except ImportError as missing:
    print(
        f"error: {missing}. Another package is called `llm` too: in a fresh environment run `pip install -e .`",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train one recipe, from its text to a model. The same command goes on where it was stopped.",
        epilog="example: python launch/train.py recipes/quickstart.yaml train.tokens=200k run=try",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe, such as train.steps=60 run=try"
    )
    parser.add_argument("--check", action="store_true", help="only check the recipe and print it with every default")
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, arguments.overrides)  # refused before the slow imports, if at all
    if arguments.check:
        print(dump(recipe), end="")
        return

    from llm.data.prompts import example, quoted
    from llm.distributed.process import say
    from llm.interop.pretrained import ready
    from llm.training.session import train

    made: list[Any] = []

    def prepare(recipe: Any) -> Any:
        made[:] = ready(recipe, say)
        return tuple(made)

    folder = train(recipe, prepare)
    prompt = quoted(example(*made))
    say(f"the run lies in {folder}; sample it with:\n  python -m llm.sample {recipe.run} --prompt {prompt}")


if __name__ == "__main__":
    run(main)
