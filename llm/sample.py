"""python -m llm.sample [RUN] --prompt TEXT: let a trained run continue a text."""

import argparse
import os
import select
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llm.base.command import Parser
from llm.base.errors import run
from llm.inference.sampling import Sampling, flag

if TYPE_CHECKING:
    from llm.run_folder.loaded_run import LoadedRun

PASTE_SECONDS = 0.05  # input that reaches a terminal sooner than this after the last line belongs to the same prompt


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "sample",
        "Let a trained run continue a text. The text goes to stdout, everything else to stderr.",
        epilog="Without a prompt: asks for one after the other on a terminal, otherwise reads one from stdin. On a "
        "terminal a pasted text is one prompt, blank lines and all; Ctrl-C ends an answer; Ctrl-D, or Ctrl-C where "
        "nothing was typed, leaves.",
    )
    parser.add_run()
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given again")
    parser.add_number("--tokens", default=200, help="at most this many new tokens (default 200)")
    for each in fields(Sampling):
        default: Any = each.default
        bounds = {name: each.metadata[name] for name in ("least", "most")}
        help = f"{each.metadata['help']} (default {default:g})"
        parser.add_number(flag(each), kind=type(default), default=default, help=help, **bounds)
    parser.add_number("--seed", most=(1 << 63) - 1, help="the same seed gives the same text (default: a new one)")
    given = parser.parse_args(arguments)
    sampling = Sampling(**{each.name: getattr(given, each.name) for each in fields(Sampling)})
    import torch

    from llm.run_folder.loaded_run import open_run

    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    opened = open_run(given.run)
    seed = given.seed if given.seed is not None else torch.seed() % (1 << 63)
    print(f"{opened.name}, seed {seed}", file=sys.stderr)
    is_dialogue = given.prompt is None and sys.stdin.isatty()
    for prompts in prompts_of(given):
        try:
            answer(opened, prompts, given.tokens, sampling, seed)
        except KeyboardInterrupt:
            if not is_dialogue:
                raise
            print()


def answer(opened: "LoadedRun", prompts: list[str], tokens: int, sampling: Sampling, seed: int) -> None:
    """Print the continuation of each prompt; of a single one token by token."""
    from llm.data.tokenizer import TextStream
    from llm.inference.generation import generate

    tokenizer, context = opened.tokenizer, opened.recipe.model.context
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    if (longest := max(map(len, ids))) > context:
        print(f"a prompt of {longest} tokens is longer than the context of {context}: its end is read", file=sys.stderr)
    began, count, is_single = time.perf_counter(), 0, len(prompts) == 1
    streams, texts = [TextStream(tokenizer) for _ in prompts], list(prompts)
    if is_single:
        print(prompts[0], end="", flush=True)
    for column in generate(opened.model, ids, tokens, sampling, seed, tokenizer.ends, tokenizer.banned):
        for row, token in enumerate(column):
            if token is not None:
                count += 1
                piece = streams[row].feed(token)
                texts[row] += piece
                if is_single:
                    print(piece, end="", flush=True)
    if is_single:
        print(streams[0].flush(), flush=True)
    else:
        for text, stream in zip(texts, streams, strict=True):
            print(f"{text}{stream.flush()}\n{'-' * 40}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def prompts_of(given: argparse.Namespace) -> Iterable[list[str]]:
    """Lists of prompts that are continued side by side: all given ones, or one after the other from a person."""
    if given.prompt is not None:
        # Arguments in another encoding than the locale's arrive as surrogates.
        yield [prompt.encode(errors="surrogateescape").decode(errors="replace") for prompt in given.prompt]
    elif sys.stdin.isatty():
        with suppress(ImportError):  # Windows has no readline
            import readline  # gives input() arrow keys and a history

            if "libedit" not in (readline.__doc__ or ""):
                readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
        print("Type or paste a text to continue; Ctrl-C ends an answer, Ctrl-D leaves.", file=sys.stderr)
        while (prompt := ask()) is not None:
            if prompt:
                yield [prompt]
    else:
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        yield [text.removesuffix("\n")]


def ask() -> str | None:
    """A prompt from a person, of several lines if it was pasted; None when the person leaves."""
    try:
        if sys.stdout.isatty():
            line = input("> ")
        else:  # input() would write the prompt sign into the text
            print("> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                raise EOFError
            line = line.removesuffix("\n")
        return f"{line}\n{pending_input()}".replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        readline = sys.modules.get("readline")
        return "" if readline and readline.get_line_buffer() else None


def pending_input() -> str:
    """The rest of a paste, on terminals that do not mark one: all input that is there already."""
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


if __name__ == "__main__":
    run(main)
