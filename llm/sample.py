"""python -m llm.sample [RUN] --prompt TEXT: let a trained run go on with a text."""

import argparse
import os
import select
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields

from llm.base.errors import RecipeError, run
from llm.inference.sampling import Sampling, flag

PASTE_SECONDS = 0.05  # what reaches a terminal sooner than this after the last line belongs to the same prompt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.sample",
        description="Let a trained run go on with a text. Text goes to stdout, everything else to stderr.",
        epilog="Without a prompt: asks for one after the other on a terminal, otherwise reads one from stdin. On a "
        "terminal a pasted text is one prompt, blank lines and all; Ctrl-C ends an answer; Ctrl-D, or Ctrl-C where "
        "nothing was typed, leaves.",
    )
    parser.add_argument(
        "run", nargs="?", help="name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to go on with; may be given several times"
    )
    parser.add_argument("--tokens", type=int, default=200, help="at most this many new tokens (default 200)")
    for each in fields(Sampling):
        parser.add_argument(
            flag(each), type=type(each.default), default=each.default,
            help=f"{each.metadata['help']} (default {each.default:g})",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (default: another one each time)")
    given = parser.parse_args()
    for name, value, fits, rule in (
        ("--tokens", given.tokens, given.tokens >= 0, "at least 0"),
        ("--seed", given.seed, given.seed is None or 0 <= given.seed < 1 << 63, "at least 0 and below 2^63"),
    ):
        if not fits:
            raise RecipeError(f"{name} = {value}: {rule} is expected")
    given.sampling = Sampling(**{each.name: getattr(given, each.name) for each in fields(Sampling)})
    return given


def prompts_of(given: argparse.Namespace) -> Iterable[list[str]]:
    """Lists of prompts that go side by side: one list, or one prompt after the other from a person."""
    if given.prompt is not None:
        # What a terminal hands over in another encoding arrives as surrogates.
        yield [prompt.encode(errors="surrogateescape").decode(errors="replace") for prompt in given.prompt]
    elif sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # arrows and a history, from here on also in input()

            if "libedit" not in (readline.__doc__ or ""):
                readline.parse_and_bind("set enable-bracketed-paste on")  # which Python takes out
        print("Type or paste a text to go on with; Ctrl-C ends an answer, Ctrl-D leaves.", file=sys.stderr)
        while (prompt := asked()) is not None:
            if prompt:
                yield [prompt]
    else:
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        yield [text.removesuffix("\n")]


def asked() -> str | None:
    """A prompt from a person, several lines where they were pasted; None when the person leaves."""
    try:
        if sys.stdout.isatty():
            line = input("> ")
        else:  # input() would write into the text
            print("> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                raise EOFError
            line = line.removesuffix("\n")
        return f"{line}\n{pending()}".replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        readline = sys.modules.get("readline")
        return "" if readline and readline.get_line_buffer() else None


def pending() -> str:
    """The rest of a paste, from terminals that do not mark one: what is there already, with or without a line's end."""
    try:
        import termios
        import tty
    except ImportError:
        return ""
    terminal, data = sys.stdin.fileno(), b""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSANOW)
    try:
        while select.select([terminal], [], [], PASTE_SECONDS)[0] and (part := os.read(terminal, 1 << 16)):
            data += part
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
    return data.decode(errors="replace")


def main() -> None:
    given = arguments()
    import torch

    from llm.data.tokenizer import TextStream
    from llm.inference.generation import generate
    from llm.run_folder.loaded_run import open_run

    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    opened = open_run(given.run)
    tokenizer = opened.tokenizer
    seed = given.seed if given.seed is not None else torch.seed() % (1 << 63)
    print(f"{opened.name}, seed {seed}", file=sys.stderr)
    sampling, asks = given.sampling, given.prompt is None and sys.stdin.isatty()

    def answer(prompts: list[str]) -> None:
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

    for prompts in prompts_of(given):
        try:
            answer(prompts)
        except KeyboardInterrupt:
            if not asks:
                raise
            print()


if __name__ == "__main__":
    run(main)
