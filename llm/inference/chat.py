"""A conversation with a model: its history, cut to the context a whole exchange at a time, and answers as they come."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from llm.base.errors import RecipeError
from llm.data.chat_template import ChatTemplate, template_of
from llm.data.conversations import Message
from llm.data.tokenizer import TextStream
from llm.inference.generation import generate
from llm.inference.sampling import Sampling
from llm.run_folder.loaded_run import LoadedRun

ROOM = 4  # a quarter of the context, or as many tokens as are asked for, stays free for an answer


@dataclass
class Conversation:
    """`messages` is the whole of it; of these the prompt holds the system message and the newest exchanges that fit."""

    run: LoadedRun
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0  # messages of the last prompt that did not fit

    def __post_init__(self) -> None:
        if not self.run.is_chat:
            raise RecipeError(
                f"{self.run.name} was not trained on conversations: train it on some (recipes/chat.yaml), or let it "
                f"continue a text by `python -m llm.sample {self.run.folder.name}`"
            )
        self.template: ChatTemplate = template_of(self.run.tokenizer)

    @property
    def system(self) -> list[Message]:
        return [each for each in self.messages[:1] if each["role"] == "system"]

    @property
    def exchanges(self) -> list[Message]:
        """Users' messages and their answers. One whose answer says nothing, as it was stopped at once, is left out."""
        said = self.messages[len(self.system) :]
        pairs = zip(said[::2], said[1::2], strict=True)
        return [each for pair in pairs if pair[1]["content"].strip() for each in pair]

    def instruct(self, text: str) -> None:
        """Replace the system message; with a blank text, remove it."""
        rest = self.messages[len(self.system) :]
        self.messages = [*([{"role": "system", "content": text}] if text.strip() else []), *rest]

    def reset(self) -> None:
        self.messages = self.system

    def undo(self) -> bool:
        """Take back the last exchange; false if there is none."""
        turns = [at for at, each in enumerate(self.messages) if each["role"] == "user"]
        self.messages = self.messages[: turns[-1]] if turns else self.messages
        return bool(turns)

    def prompt(self, text: str, tokens: int) -> list[int]:
        """The ids before the answer to `text`. RecipeError if the context cannot hold it alone."""
        context, system = self.run.model.shape.context, self.system
        room = context - min(tokens, context // ROOM)
        whole = self.exchanges

        def ids(dropped: int) -> list[int]:
            return self.template.prompt([*system, *whole[2 * dropped :], {"role": "user", "content": text}])

        fewest, found = 0, ids(0)
        if len(found) > room:  # a binary search, as a request may bring thousands of exchanges
            fewest = bisect_left(range(len(whole) // 2), True, key=lambda dropped: len(ids(dropped)) <= room)
            found = ids(fewest)
        if len(found) > room:
            raise RecipeError(
                f"a message of {len(found):,} tokens, its markers and the system message included, is longer than "
                f"the {room:,} of the context of {context:,} that an answer leaves: shorten it"
            )
        self.dropped = 2 * fewest
        return found

    def answer(self, text: str, tokens: int, sampling: Sampling, seed: int) -> Iterator[str]:
        """Yield the answer to `text`, piece by piece. `messages` keeps the part yielded, even if the caller stops."""
        ids = self.prompt(text, tokens)
        stream, spoken = TextStream(self.run.tokenizer), ""
        tokens = min(tokens, self.run.model.shape.context - len(ids) + 1)
        columns = generate(self.run.model, [ids], tokens, sampling, seed, self.template.ends, self.template.banned)
        try:
            for (token,) in columns:
                if token is not None:
                    piece = stream.feed(token)
                    spoken += piece
                    yield piece
            rest = stream.flush()
            spoken += rest
            yield rest
        finally:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": spoken}]
