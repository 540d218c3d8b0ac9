"""python -m llm.sample [RUN] --prompt TEXT: let a trained run go on with a text."""

import argparse
import sys
import time
from collections.abc import Iterable

from llm.errors import RecipeError, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.sample",
        description="Let a trained run go on with a text. Text goes to stdout, everything else to stderr.",
        epilog="Without a prompt: asks for one on a terminal, otherwise reads one from stdin.",
    )
    parser.add_argument(
        "run", nargs="?", help="name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to go on with; may be given several times"
    )
    parser.add_argument("--tokens", type=int, default=200, help="at most this many new tokens (default 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: always the likeliest token; 1: as the model says (default 0.8)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="choose among this many likeliest tokens; 0: all (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="among the likeliest that hold this probability together (default 1)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.05,
        help="among those with this share of the likeliest one's probability (default 0.05)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: makes tokens that occurred less likely (default 1)",
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (default: another one each time)")
    given = parser.parse_args()
    for name, value, fits, rule in (
        ("--tokens", given.tokens, given.tokens >= 0, "at least 0"),
        ("--temperature", given.temperature, 0 <= given.temperature < 1e6, "at least 0"),
        ("--top-k", given.top_k, given.top_k >= 0, "at least 0"),
        ("--top-p", given.top_p, 0 < given.top_p <= 1, "above 0 and at most 1"),
        ("--min-p", given.min_p, 0 <= given.min_p <= 1, "between 0 and 1"),
        ("--repetition-penalty", given.repetition_penalty, 0 < given.repetition_penalty < 1e6, "above 0"),
        ("--seed", given.seed, given.seed is None or 0 <= given.seed < 1 << 63, "at least 0 and below 2^63"),
    ):
        if not fits:
            raise RecipeError(f"{name} = {value}: {rule} is expected")
    return given


def prompts_of(given: argparse.Namespace) -> Iterable[list[str]]:
    """Lists of prompts that go side by side: one list, or one prompt after the other from a person."""
    if given.prompt is not None:
        # What a terminal hands over in another encoding arrives as surrogates.
        yield [prompt.encode(errors="surrogateescape").decode(errors="replace") for prompt in given.prompt]
    elif sys.stdin.isatty():
        print("Type a text to go on with; an empty line or Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if not line:
                return
            yield [line]
    else:
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        yield [text.removesuffix("\n")]


def main() -> None:
    given = arguments()
    import torch

    from llm.generation import Sampling, generate
    from llm.runs import open_run
    from llm.tokenizer import TextStream

    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    opened = open_run(given.run)
    tokenizer = opened.tokenizer
    sampling = Sampling(given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty)
    seed = given.seed if given.seed is not None else torch.seed() % (1 << 63)
    print(f"{opened.name}, seed {seed}", file=sys.stderr)
    for prompts in prompts_of(given):
        ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
        context = opened.recipe.model.context
        if (longest := max(map(len, ids))) > context:
            print(
                f"a prompt of {longest} tokens is longer than the context of {context}: its end is read",
                file=sys.stderr,
            )
        began, count = time.perf_counter(), 0
        streams = [TextStream(tokenizer) for _ in prompts]
        texts = [""] * len(prompts)
        alone = len(prompts) == 1
        if alone:
            print(prompts[0], end="", flush=True)
        for column in generate(opened.model, ids, given.tokens, sampling, seed, tokenizer.ends, tokenizer.banned):
            for row, token in enumerate(column):
                if token is not None:
                    count += 1
                    piece = streams[row].feed(token)
                    texts[row] += piece
                    if alone:
                        print(piece, end="", flush=True)
        if alone:
            print(streams[0].flush(), flush=True)
        else:
            for prompt, text, stream in zip(prompts, texts, streams, strict=True):
                print(f"{prompt}{text}{stream.flush()}\n{'-' * 40}", flush=True)
        seconds = time.perf_counter() - began
        print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run(main)
