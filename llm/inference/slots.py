"""Slots: texts that are decoded side by side; each joins and leaves at any step, and its bits ignore the others.

A text is read alone when it joins. After that all rows take a step at once, in a fixed number of rows where kernels
round by that number. So a server of many users and a single prompt of `llm.sample` say the same, to the bit.
"""

import torch
from torch import Tensor

from llm.inference.fast_decode import KNOWN, SLOTS, FastDecoder, GraphDecoder, reach
from llm.model.transformer import Cache, Transformer


class Slots:
    """Room for `rows` texts of at most `length` tokens each (default: the context).

    With `fixed` false the bits may depend on the number of rows, and the cache takes no more memory than these need.
    """

    def __init__(self, model: Transformer, rows: int, length: int | None = None, *, fixed: bool = True) -> None:
        weights, context = model.lm_head.weight, model.shape.context
        device = weights.device
        self.model, self.lengths = model, [0] * rows
        is_ours = all(type(module) in KNOWN for module in model.modules())
        # A sharded model's weights, which has `unshard`, are gathered in its own forward pass only.
        is_fast = is_ours and not hasattr(model, "unshard")
        self.fast = FastDecoder(model) if is_fast and device.type == "cpu" else None
        if self.fast is not None:
            length = reach(length or context, context)
            self.widths = [width for width in self.fast.widths if width < rows]
            self.widths.append(next((width for width in self.fast.widths if width >= rows), rows))
        else:
            length = context if fixed or length is None else min(context, -(-length // 128) * 128)
            self.widths = [max(SLOTS, rows) if fixed else rows]
        self.cache = Cache(model.shape, self.widths[-1], length, device, weights.dtype)
        self.graph = GraphDecoder(model, self.cache) if is_fast and device.type == "cuda" else None

    def join(self, row: int, text: list[int]) -> Tensor:
        """Read `text` into a row, in place of the one there; returns the logits (V,) after it."""
        self.lengths[row] = len(text)
        return prefill(self.model, self.cache.row(row), [text])[0]

    @torch.no_grad()
    def step(self, tokens: dict[int, int]) -> Tensor:
        """Logits (B, V) after the next token of each row in `tokens`, in that order. The other rows lose their text."""
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
        return logits[torch.tensor(list(tokens), device=logits.device)]


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
