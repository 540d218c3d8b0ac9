"""The recipes that come with the project, by their names: they lie in recipes/ of a checkout, and within a wheel."""

import os
from collections.abc import Sequence
from pathlib import Path

from llm.base.errors import RecipeError
from llm.config.reading import load
from llm.config.schema import Recipe

ROOT = Path(__file__).parents[1]
PACKAGED = (ROOT / "_recipes", ROOT.parent / "recipes")  # in a wheel, in a checkout


def names() -> dict[str, Path]:
    """The packaged recipes' files by their names."""
    folder = next(folder for folder in PACKAGED if folder.is_dir())
    return {each.stem: each for each in sorted(folder.glob("*.yaml"))}


def recipes(name: str) -> Path:
    """The file of a packaged recipe, such as "quickstart". RecipeError names those that there are."""
    known = names()
    if name not in known:
        raise RecipeError(f"there is no packaged recipe {name!r}: there are {', '.join(known)}")
    return known[name]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a packaged recipe by its name, with overrides such as "train.steps=60".

    RecipeError for anything that is wrong in it.
    """
    path = Path(path)
    # pathlib's exists raises where a name is too long.
    named = not path.suffix and path.name == str(path) and not os.path.exists(path)  # noqa: PTH110
    return load(recipes(str(path)) if named else path, tuple(overrides))
