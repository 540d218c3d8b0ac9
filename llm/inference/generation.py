"""Text generation: prefill, choose, step, repeat. Rows may differ in length; each keeps its own position."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm.data.chat_template import ChatTemplate
from llm.data.tokenizer import Tokenizer
from llm.inference.fast_decode import KNOWN, FastDecoder, GraphDecoder
from llm.inference.sampling import Sampling
from llm.model.transformer import Cache, Transformer

COLDEST = torch.finfo(torch.float32).tiny  # below it dividing by the temperature overflows: choose greedily


def choose(logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample the next token of each row: (B,) from logits (B, V).

    `seen` (B, V, bool) marks tokens that occurred, for the repetition penalty.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        punished = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    # On the CPU, so that a seed gives the same text on any device; CUDA also lacks some deterministic kernels.
    device, logits = logits.device, logits.cpu()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # the largest is 0 at any temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k, dim=-1).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        late = probabilities.cumsum(-1) - probabilities > sampling.top_p  # the tokens before it already hold enough
        logits = logits.masked_fill(late.gather(-1, index.argsort(-1)), -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].to(device)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    seed: int = 0,
    ends: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, up to `tokens` times; a row yields None from one of `ends` on.

    Stops once all rows have ended. A row that fills the context continues from its last half; of a longer prompt only
    the last `context` tokens are read. Prompts must not be empty. `banned` tokens are never chosen.
    """
    device = model.lm_head.weight.device
    context = model.shape.context
    texts = [list(prompt[-context:]) for prompt in prompts]
    seen = _seen(texts, model.lm_head.weight) if sampling.repetition_penalty != 1.0 else None
    never = torch.tensor(banned, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(seed)
    # The length affects the kernels' rounding, so only multiples of 128 occur.
    length = min(context, -(-(max(map(len, texts)) + tokens) // 128) * 128)
    cache = Cache(model.shape, len(texts), length, device, model.lm_head.weight.dtype)
    decoder = _decoder(model, cache) if tokens > 1 else None
    done = [False] * len(texts)
    logits = None
    for _ in range(tokens):
        if logits is None:
            logits = prefill(model, cache, texts)
            if decoder is not None:
                decoder.begin([len(text) for text in texts])
        if banned:
            logits = logits.index_fill(1, never, -torch.inf)
        chosen = choose(logits, seen, sampling, generator)
        if seen is not None:
            seen[torch.arange(len(seen), device=device), chosen] = True
        ids = chosen.tolist()
        done = [before or token in ends for before, token in zip(done, ids, strict=True)]
        yield [None if over else token for over, token in zip(done, ids, strict=True)]
        if all(done):
            return
        for text, token in zip(texts, ids, strict=True):
            text.append(token)
        if max(map(len, texts)) > context:
            texts = [text[-(context // 2) :] if len(text) > context else text for text in texts]
            logits = None
        elif decoder is not None:
            logits = decoder.step(chosen)
        else:
            cache.at(torch.tensor([[len(text) - 1] for text in texts], device=device), max(map(len, texts)))
            logits = model.logits(chosen[:, None], cache)[:, -1]


def _seen(texts: list[list[int]], head: Tensor) -> Tensor:
    """Which tokens occur in each text: bool (B, V)."""
    seen = torch.zeros(len(texts), len(head), dtype=torch.bool, device=head.device)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return seen


def _decoder(model: Transformer, cache: Cache) -> FastDecoder | GraphDecoder | None:
    """The device's fast decoder; None for a caller's own model, and for a sharded one.

    A sharded model's weights are gathered in its own forward pass only.
    """
    device, is_ours = cache.keys.device.type, all(type(module) in KNOWN for module in model.modules())
    if hasattr(model, "unshard") or device not in ("cpu", "cuda") or not is_ours:  # fully_shard adds `unshard`
        return None
    return GraphDecoder(model, cache) if device == "cuda" else FastDecoder(model, cache)


def prefill(model: Transformer, cache: Cache, texts: list[list[int]]) -> Tensor:
    """Read `texts` into an empty cache; returns the logits (B, V) after the last token of each.

    Shorter rows are padded at the end, where none of their queries looks.
    """
    width = max(map(len, texts))
    device = cache.keys.device
    padded = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    cache.at(torch.arange(width, device=device).expand(len(texts), width), width)
    return model.logits(padded, cache, last=torch.tensor([len(text) - 1 for text in texts], device=device))


def continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    seed: int = 0,
    template: ChatTemplate | None = None,
) -> list[str]:
    """Generated text for each prompt. A `template` decides which tokens end an answer and which it never holds."""
    by = template or tokenizer
    columns = list(generate(model, prompts, tokens, sampling, seed, by.ends, by.banned))
    rows = ([column[row] for column in columns] for row in range(len(prompts)))
    return [tokenizer.decode([token for token in row if token is not None]) for row in rows]
