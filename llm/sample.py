"""python -m llm.sample [RUN] --prompt TEXT: let a trained run continue a text."""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm.base.command import Parser, as_text
from llm.base.errors import RecipeError, run
from llm.inference import terminal
from llm.inference.sampling import INT8, Sampling, add_sampling, sampling_of
from llm.inference.stop import Stop

if TYPE_CHECKING:
    from llm.run_folder.loaded_run import LoadedRun


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "sample",
        "Let a trained run continue a text. The text goes to stdout, everything else to stderr.",
        epilog="Without a prompt: asks for one after the other on a terminal, otherwise reads one from stdin. On a "
        "terminal a pasted text is one prompt, blank lines and all; Ctrl-C ends an answer; Ctrl-D, or Ctrl-C where "
        "nothing was typed, leaves.",
    )
    parser.add_run()
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be given again")
    add("--prompt-file", type=Path, metavar="FILE", help="continue the text in this file")
    add("--stop", action="append", metavar="TEXT", default=[], help="end before this text; may be given again")
    parser.add_number("--tokens", default=200, help="at most this many new tokens (default 200)")
    add_sampling(parser)
    add("--int8", action="store_true", help=INT8)
    parser.add_number("--seed", most=(1 << 63) - 1, help="the same seed gives the same text (default: a new one)")
    given = parser.parse_args(arguments)
    if not all(given.stop):
        raise RecipeError("--stop is empty: name the text to end before")
    given.stop = [*map(as_text, given.stop)]
    if given.prompt_file is not None:
        given.prompt = [*(given.prompt or []), text_in(given.prompt_file)]
    sampling = sampling_of(given)
    import torch

    from llm.inference.fast_decode import prepare_weights
    from llm.run_folder.loaded_run import open_run

    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    opened = open_run(given.run)
    prepare_weights(opened.model, int8=given.int8)
    seed = given.seed if given.seed is not None else torch.seed() % (1 << 63)
    print(f"{opened.name}, seed {seed}", file=sys.stderr)
    is_dialogue = given.prompt is None and sys.stdin.isatty()
    for prompts in prompts_of(given):
        try:
            answer(opened, prompts, given.tokens, sampling, seed, given.stop)
        except KeyboardInterrupt:
            if not is_dialogue:
                raise
            print()


def text_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise RecipeError(f"--prompt-file = {path} cannot be read as text: {cause}") from None


def answer(
    opened: "LoadedRun",
    prompts: list[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    stop: Iterable[str] = (),
) -> None:
    """Print the continuation of each prompt, up to one of `stop`; of a single one token by token."""
    from llm.data.tokenizer import TextStream
    from llm.inference.generation import generate

    tokenizer, context = opened.tokenizer, opened.recipe.model.context
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    if (longest := max(map(len, ids))) > context:
        print(f"a prompt of {longest} tokens is longer than the context of {context}: its end is read", file=sys.stderr)
    began, count, is_single = time.perf_counter(), 0, len(prompts) == 1
    streams, texts = [TextStream(tokenizer) for _ in prompts], list(prompts)
    stops = [Stop(list(stop)) for _ in prompts]
    if is_single:
        print(prompts[0], end="", flush=True)
    for column in generate(opened.model, ids, tokens, sampling, seed, tokenizer.ends, tokenizer.banned):
        for row, token in enumerate(column):
            if token is not None:
                count += 1
                piece = stops[row].feed(streams[row].feed(token))
                texts[row] += piece
                if is_single:
                    print(piece, end="", flush=True)
        if all(each.over for each in stops):
            break
    ends = [each.feed(stream.flush()) + each.held for stream, each in zip(streams, stops, strict=True)]
    if is_single:
        print(ends[0], flush=True)
    else:
        for text, end in zip(texts, ends, strict=True):
            print(f"{text}{end}\n{'-' * 40}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def prompts_of(given: argparse.Namespace) -> Iterable[list[str]]:
    """Lists of prompts that are continued side by side: all given ones, or one after the other from a person."""
    if given.prompt is not None:
        yield [*map(as_text, given.prompt)]
    elif sys.stdin.isatty():
        terminal.set_up()
        print("Type or paste a text to continue; Ctrl-C ends an answer, Ctrl-D leaves.", file=sys.stderr)
        while (prompt := terminal.ask()) is not None:
            if prompt:
                yield [prompt]
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace", newline=None)  # type: ignore[union-attr]
        yield [sys.stdin.read().removesuffix("\n")]


if __name__ == "__main__":
    run(main)
