"""python -m llm.chat [RUN]: talk to a run that was trained on conversations."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llm.base.command import Parser, as_text
from llm.base.errors import LLMError, RecipeError, run
from llm.data.conversations import checked
from llm.inference import terminal
from llm.inference.sampling import INT8, add_sampling, sampling_of

if TYPE_CHECKING:
    from llm.inference.chat import Conversation

HELP = """/reset            begin anew (the system message stays)
/system TEXT      what the model is told first; without TEXT: nothing
/undo             take back the last exchange
/save FILE.jsonl  add the conversation to a file that text.files can name
/help             this list; Ctrl-C ends an answer, Ctrl-D leaves"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "chat",
        "Talk to a run that was trained on conversations. Answers go to stdout, everything else to stderr.",
        epilog="A pasted text is one message, blank lines and all. /help lists what can be typed beside messages. "
        "Without a terminal each line of stdin is a message.",
    )
    parser.add_run()
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_number("--tokens", default=200, least=1, help="at most this many new tokens an answer (default 200)")
    add_sampling(parser)
    parser.add_argument("--int8", action="store_true", help=INT8)
    parser.add_number("--seed", most=(1 << 63) - 1, help="the same seed gives the same answers (default: another)")
    given = parser.parse_args(arguments)
    given.sampling = sampling_of(given)
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    import torch

    from llm.inference.chat import Conversation
    from llm.inference.fast_decode import prepare_weights
    from llm.run_folder.loaded_run import open_run

    lines = {} if sys.stdin.isatty() else {"encoding": "utf-8-sig", "newline": None}
    sys.stdin.reconfigure(errors="replace", **lines)  # type: ignore[union-attr]
    conversation = Conversation(open_run(given.run))
    prepare_weights(conversation.run.model, int8=given.int8)
    # Arguments in another encoding than the locale's arrive as surrogates.
    conversation.instruct(as_text(given.system or ""))
    seed = given.seed if given.seed is not None else torch.seed() % (1 << 63)
    tell(f"{conversation.run.name}, seed {seed}")
    ask: Callable[[], str | None] = line_of_stdin
    if sys.stdin.isatty():
        terminal.set_up()
        tell("Type a message; /help lists commands; Ctrl-C ends an answer, Ctrl-D leaves.")
        ask = partial(terminal.ask, stay=True)
    said_dropped = False
    while (text := ask()) is not None:
        try:
            if "\0" in text:
                raise RecipeError("a NUL is no plain text, and /save could not keep it: leave it out")
            if text.startswith("/"):
                command(conversation, text)
            elif text.strip():
                say(conversation, text, given, seed)
                if conversation.dropped and not said_dropped:
                    said_dropped = True
                    tell("(the oldest exchanges no longer fit into the context: the model does not see them)")
        except LLMError as error:
            tell(f"({error})")
        except KeyboardInterrupt:
            print()
            if not sys.stdin.isatty():
                raise


def say(conversation: "Conversation", text: str, given: argparse.Namespace, seed: int) -> None:
    """Print the answer as it comes. The seed of each turn is another, or equal messages would be answered alike."""
    for piece in conversation.answer(
        text, given.tokens, given.sampling, (seed + len(conversation.messages)) % (1 << 63)
    ):
        print(piece, end="", flush=True)
    print(flush=True)


def command(conversation: "Conversation", text: str) -> None:
    """Do what a line that begins with a slash says. RecipeError if that is not known."""
    name, rest = (*text.split(maxsplit=1), "")[:2]
    rest = rest.strip()
    if name == "/help":
        tell(HELP)
    elif name == "/reset":
        conversation.reset()
        tell("(a new conversation)")
    elif name == "/system":
        conversation.instruct(rest)
        tell("(the system message is set)" if rest else "(no system message)")
    elif name == "/undo":
        tell("(the last exchange is taken back)" if conversation.undo() else "(there is nothing to take back)")
    elif name == "/save":
        save(conversation, rest)
    else:
        raise RecipeError(f"{name[:40]} is no command: /help lists them")


def save(conversation: "Conversation", name: str) -> None:
    """Add the conversation to a .jsonl file. RecipeError where that is not possible."""
    if not name or not conversation.exchanges:
        raise RecipeError("write /save FILE.jsonl, after a first answer")
    said = checked("the conversation", {"messages": [*conversation.system, *conversation.exchanges]})
    try:
        with Path(name).expanduser().open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
                file.write(b"\n")  # the last line had no end
            file.write(json.dumps({"messages": said}, ensure_ascii=False).encode() + b"\n")
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{name[:200]} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    tell(f"(added to {name})")


def line_of_stdin() -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
