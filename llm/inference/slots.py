"""Slots: texts that are decoded side by side; each joins and leaves at any step, and its bits ignore the others.

A text is read alone when it joins. After that all rows take a step at once, in a fixed number of rows where kernels
round by that number. So a server of many users and a single prompt of `llm.sample` say the same, to the bit. While one
text goes on alone, a step on a CPU also reads tokens that are guessed to follow (`lookup.py`): as rows ignore each
other, the logits after a guess that comes true are those of a step of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.inference.fast_decode import PREPARED, SLOTS, FastDecoder, GraphDecoder, is_known, reach
from llm.inference.lookup import Lookup
from llm.model.transformer import Cache, Transformer

SHORT = 32  # tokens of a text that weights of 8 bits read in half of the time that the model takes
TOGETHER = 8  # short texts that are read in one step


class Slots:
    """Room for `rows` texts of at most `length` tokens each (default: the context).

    With `fixed` false the bits may depend on the number of rows, and the cache takes no more memory than these need.
    """

    def __init__(self, model: Transformer, rows: int, length: int | None = None, *, fixed: bool = True) -> None:
        weights, context = model.lm_head.weight, model.shape.context
        device = weights.device
        self.model, self.lengths = model, [0] * rows
        is_fast = is_known(model)
        self.fast = (PREPARED.get(model) or FastDecoder(model)) if is_fast and device.type == "cpu" else None
        if self.fast is not None:
            length = reach(length or context, context)
            self.widths = [width for width in self.fast.widths if width < rows]
            self.widths.append(next((width for width in self.fast.widths if width >= rows), rows))
        else:
            length = context if fixed or length is None else min(context, -(-length // 128) * 128)
            self.widths = [max(SLOTS, rows) if fixed else rows]
        self.cache = Cache(model.shape, self.widths[-1], length, device, weights.dtype)
        self.graph = GraphDecoder(model, self.cache) if is_fast and device.type == "cuda" else None
        self.lookups: dict[int, Lookup] = {}
        self.ahead: Ahead | None = None

    def join(self, texts: dict[int, list[int]]) -> dict[int, Tensor]:
        """Read a text into each of these rows, in place of the one there; returns the logits (V,) after each."""
        if not texts:
            return {}
        self.ahead = None
        for row, text in texts.items():
            self.lengths[row] = len(text)
            if self.fast is not None:
                self.lookups[row] = Lookup(text)
        is_int8 = self.fast is not None and self.fast.int8
        short = [row for row, text in texts.items() if is_int8 and len(text) <= SHORT]
        found: dict[int, Tensor] = {}
        for low in range(0, len(short), TOGETHER):
            found |= self._read({row: texts[row] for row in short[low : low + TOGETHER]})
        others = {row: prefill(self.model, self.cache.row(row), [texts[row]])[0] for row in texts if row not in found}
        return found | others

    def _read(self, texts: dict[int, list[int]]) -> dict[int, Tensor]:
        """The logits (V,) after each of these short texts, which the decoder reads in one step."""
        assert self.fast is not None
        tokens = [token for text in texts.values() for token in text]
        positions = [at for text in texts.values() for at in range(len(text))]
        rows = [row for row, text in texts.items() for _ in text]
        ends = torch.tensor([len(text) for text in texts.values()]).cumsum(0) - 1
        return dict(zip(texts, self.fast.step(self.cache, tokens, positions, rows, ends), strict=True))

    @torch.no_grad()
    def step(self, tokens: dict[int, int]) -> Tensor:
        """Logits (B, V) after the next token of each row in `tokens`, in that order. The other rows lose their text."""
        if self.fast is not None:
            for row, token in tokens.items():
                self.lookups[row].append(token)
            row = next(iter(tokens))
            if len(tokens) == 1 and len(self.cache.slots) - self.lengths[row] >= self.fast.widths[0]:
                return self._alone(self.fast, row, tokens[row])
        self.ahead = None
        width = next(width for width in self.widths if width > max(tokens))
        ids = [tokens.get(row, 0) for row in range(width)]
        # Idle rows follow one that goes on, so that they ask for no part of the cache of their own.
        idle = self.lengths[next(iter(tokens))]
        positions = [self.lengths[row] if row in tokens else idle for row in range(width)]
        for row in tokens:
            self.lengths[row] += 1
        if self.fast is not None:
            logits = self.fast.step(self.cache, ids, positions)
        elif self.graph is not None:
            logits = self.graph.step(ids, positions)
        else:
            device = self.cache.keys.device
            self.cache.at(torch.tensor(positions, device=device)[:, None], len(self.cache.slots))
            logits = self.model.logits(torch.tensor(ids, device=device)[:, None], self.cache)[:, -1]
        if list(tokens) == [*range(len(tokens))]:
            return logits[: len(tokens)]
        return logits[torch.tensor(list(tokens), device=logits.device)]

    def _alone(self, fast: FastDecoder, row: int, token: int) -> Tensor:
        """Logits (1, V) after the next token of the only row that goes on, and with them those after guesses."""
        if self.ahead is None or not self.ahead.holds(row, token):
            lookup, at = self.lookups[row], self.lengths[row]
            if self.ahead is not None and self.ahead.row == row and self.ahead.guess:
                lookup.learn(len(self.ahead.guess), self.ahead.right)
            guess = lookup.guess()
            most = min(len(self.cache.slots) - at, max(1 + len(guess), fast.widths[0]))
            width = max(width for width in fast.widths if width <= most)
            ids = [token, *guess, *[0] * width][:width]
            logits = fast.step(self.cache, ids, range(at, at + width), [row] * width)
            self.ahead = Ahead(row, guess[: width - 1], logits)
        self.lengths[row] += 1
        return self.ahead.logits[self.ahead.right :][:1]


@dataclass
class Ahead:
    """The logits (N, V) of a step of one row: after its token and after each token that was guessed to follow."""

    row: int
    guess: list[int]
    logits: Tensor
    right: int = 0  # tokens of the guess that came true

    def holds(self, row: int, token: int) -> bool:
        """Note the next token; true if it was guessed."""
        if self.row != row or self.guess[self.right : self.right + 1] != [token]:
            return False
        self.right += 1
        return True


@torch.no_grad()
def prefill(model: Transformer, cache: Cache, texts: list[list[int]]) -> Tensor:
    """Read `texts` into an empty cache; returns the logits (B, V) after the last token of each.

    Shorter rows are padded at the end, where none of their queries looks.
    """
    width = max(map(len, texts))
    device = cache.keys.device
    padded = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    cache.at(torch.arange(width, device=device).expand(len(texts), width), width)
    return model.logits(padded, cache, last=torch.tensor([len(text) - 1 for text in texts], device=device))
