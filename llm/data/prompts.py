"""Prompts where a recipe names none: what a model can be asked to go on with depends on its text."""

import shlex
from dataclasses import replace

from llm.config.schema import AUTO_PROMPTS, Recipe
from llm.data.shards import Shards
from llm.data.tokenizer import Tokenizer

LONGEST = 32  # characters of an opening
OPENINGS = {("wiki-leads",): "My self Har"}  # of packaged text


def settled(recipe: Recipe, tokenizer: Tokenizer, shards: Shards) -> Recipe:
    """The recipe with evaluate.prompts = auto made the opening of its text."""
    if recipe.evaluate.prompts != AUTO_PROMPTS:
        return recipe
    return replace(recipe, evaluate=replace(recipe.evaluate, prompts=(opening(recipe, tokenizer, shards),)))


def example(recipe: Recipe, tokenizer: Tokenizer, shards: Shards) -> str:
    """The first prompt of a settled recipe, else the opening of its text."""
    return (recipe.evaluate.prompts or (opening(recipe, tokenizer, shards),))[0]


def opening(recipe: Recipe, tokenizer: Tokenizer, shards: Shards) -> str:
    """How a document begins, one that is held out where there is one: the first words of its first line."""
    if recipe.text.files in OPENINGS:
        return OPENINGS[recipe.text.files]
    side = shards.validation if shards.validation.tokens else shards.train
    lines = tokenizer.decode(side.read(0, min(side.tokens, 4 * LONGEST)).tolist()).splitlines()
    line = next((line for line in lines if line.strip()), "")
    line = "".join(each for each in line if each.isprintable()).strip("\ufffd ")
    words = line[:LONGEST].rpartition(" ")[0] if len(line) > LONGEST else line
    return words or line[:LONGEST]


def quoted(text: str) -> str:
    """`text` as one argument of a shell."""
    return shlex.quote(text) if set(text) & set('"$`\\!\n') else f'"{text}"'
