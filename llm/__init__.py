"""From one text file to a language model that talks.

The public API is imported when it is first used, so that `import llm` and every `--help` answer at once:

    import llm
    recipe = llm.load_recipe("recipes/quickstart.yaml", ["train.steps=60", "run=try"])
    run = llm.train(recipe)
    run.generate("My self Har", tokens=50)

llm/README.md draws the layers of the package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from llm.api import Run, load_recipe, open_run, recipes, train

__version__ = "0.1.0"
__all__ = ["Run", "load_recipe", "open_run", "recipes", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llm' has no attribute {name!r}")
    from llm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
