"""python -m llm.evaluate [RUN] [FILE ...]: how well a run predicts held-out text."""

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from llm.errors import RecipeError, TextError, run

if TYPE_CHECKING:
    from llm.runs import Opened
    from llm.shards import Side
    from llm.stream import Tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.evaluate",
        description="Loss, bits per byte and perplexity of a run, over its validation side or over texts of your own.",
    )
    parser.add_argument(
        "run", nargs="?", help="name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
    )
    parser.add_argument(
        "--text", action="append", metavar="FILE", help="a text, glob or named text instead of the validation side"
    )
    parser.add_argument("--rows", type=int, default=8, help="windows at once (default 8)")
    given = parser.parse_args()
    if given.rows < 1:
        raise RecipeError(f"--rows = {given.rows}: at least 1 is expected")
    return given


def main() -> None:
    given = arguments()
    import torch

    from llm.runs import open_run
    from llm.stream import whole

    opened = open_run(given.run)
    tokens, size, documents, words, name = _own_text(opened, given.text) if given.text else _validation(opened)
    device = opened.model.lm_head.weight.device
    nats = 0.0
    with torch.no_grad():
        for batch in whole(tokens, opened.recipe.model.context, given.rows):
            batch = batch.to(device)
            nats += opened.model(batch.tokens, batch.targets).item()
    targets = tokens.tokens - 1
    print(
        f"run                   {opened.name}\n"
        f"text                  {name}: {documents:,} documents, {size:,} bytes, {targets:,} targets\n"
        f"loss                  {nats / targets:.4f} nats a token\n"
        f"bits per byte         {nats / size / math.log(2):.4f}\n"
        f"perplexity a token    {_exp(nats / targets):,.2f}\n"
        f"perplexity a word     {_exp(nats / max(words, 1)):,.2f}"
    )


def _own_text(opened: "Opened", files: list[str]) -> tuple["Side | Tokens", int, int, int, str]:
    """Tokens, bytes, documents, words and name of texts, split into documents as the run's own were."""
    import numpy as np

    from llm.corpus import Corpus
    from llm.stream import Tokens

    parts, size, words = [], 0, 0
    for document in Corpus(replace(opened.recipe.text, files=tuple(files))).documents():
        parts.append(np.array([opened.tokenizer.bos, *opened.tokenizer.encode(document.decode())], np.uint32))
        size, words = size + len(document), words + len(document.split())
    return Tokens(np.concatenate(parts)), size, len(parts), words, ", ".join(files)


def _validation(opened: "Opened") -> tuple["Side | Tokens", int, int, int, str]:
    """The same of the validation side that the run was evaluated on."""
    from llm.shards import Shards
    from llm.store import read_sealed

    side = Shards.open(Path(read_sealed(opened.folder / "shards.json")["folder"])).validation
    if not side.tokens:
        raise TextError(
            f"run {opened.folder.name} has no validation side (text.validation = 0): name a text with --text"
        )
    bounds = [*side.document_starts().tolist(), side.tokens]
    words = sum(len(opened.tokenizer.decode(side.read(*pair).tolist()).split()) for pair in pairwise(bounds))
    return side, side.text_bytes, side.documents, words, "validation side"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


if __name__ == "__main__":
    run(main)
