"""Default prompts, taken from the beginning of a document of the recipe's own text."""

import shlex
from dataclasses import replace

from llm.config.schema import AUTO_PROMPTS, Recipe
from llm.data.chat_template import TURN
from llm.data.shards import AnyShards, Split
from llm.data.tokenizer import Tokenizer

MAX_OPENING = 32  # characters
OPENINGS = {("wiki-leads",): "My self Har"}  # of packaged texts


def with_prompts(recipe: Recipe, tokenizer: Tokenizer, shards: AnyShards) -> Recipe:
    """The recipe with evaluate.prompts = auto replaced by the opening of its text."""
    if recipe.evaluate.prompts != AUTO_PROMPTS:
        return recipe
    return replace(recipe, evaluate=replace(recipe.evaluate, prompts=(opening(recipe, tokenizer, shards),)))


def example(recipe: Recipe, tokenizer: Tokenizer, shards: AnyShards) -> str:
    """The first prompt of a recipe, or the opening of its text if it has none."""
    return (recipe.evaluate.prompts or (opening(recipe, tokenizer, shards),))[0]


def opening(recipe: Recipe, tokenizer: Tokenizer, shards: AnyShards) -> str:
    """The first words of a document, a held-out one if there is any."""
    if recipe.text.files in OPENINGS:
        return OPENINGS[recipe.text.files]
    chosen = next(each for each in shards.sources.values() if each.is_chat == shards.is_chat)
    side = chosen.validation if chosen.validation.tokens else chosen.train
    if shards.is_chat:
        return _first_message(tokenizer, side)
    lines = tokenizer.decode(side.read(0, min(side.tokens, 4 * MAX_OPENING)).tolist()).splitlines()
    line = next((line for line in lines if line.strip()), "")
    line = "".join(each for each in line if each.isprintable()).strip("\ufffd ")
    words = line[:MAX_OPENING].rpartition(" ")[0] if len(line) > MAX_OPENING else line
    return words or line[:MAX_OPENING]


def _first_message(tokenizer: Tokenizer, side: Split) -> str:
    """The user's first message of the first conversation in which it is short."""
    starts = side.document_starts()[:100].tolist()
    said = [_opening_of(tokenizer, side, begin) for begin in starts]
    return next((text for text in said if 0 < len(text) <= 2 * MAX_OPENING), "Hello")


def _opening_of(tokenizer: Tokenizer, side: Split, begin: int) -> str:
    ids = side.read(begin, min(side.tokens, begin + 4 * MAX_OPENING)).tolist()
    parts = side.parts(begin, begin + len(ids)).tolist()
    turn = parts.index(TURN) if TURN in parts else len(ids)
    end = next((at for at in range(turn + 1, len(ids)) if not tokenizer.bytes_of(ids[at])), turn)
    text = tokenizer.decode(ids[turn:end])
    return text if text.isprintable() else ""


def quoted(text: str) -> str:
    """`text` as one argument of a shell."""
    return shlex.quote(text) if set(text) & set('"$`\\!\n') else f'"{text}"'
