"""Text out of a model: prefill, choose, step, repeat. Rows of any lengths go side by side, each at its own position."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm.inference.fast_decode import FastDecoder, GraphDecoder
from llm.inference.sampling import Sampling
from llm.model.transformer import Cache, Transformer

COLDEST = torch.finfo(torch.float32).tiny  # a smaller temperature is none: dividing by it gives no number


def choose(logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row: (B,) out of logits (B, V).

    `seen` (B, V) of bool marks the tokens that occurred; without it there is no penalty.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        punished = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    # On the CPU, so that a seed says the same on any device, and as CUDA refuses some of this where bits must repeat.
    device, logits = logits.device, logits.cpu()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # the largest is 0 at any temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k, dim=-1).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        late = shares.cumsum(-1) - shares > sampling.top_p  # what comes before already holds enough
        logits = logits.masked_fill(late.gather(-1, index.argsort(-1)), -torch.inf)
    if sampling.min_p > 0:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), -torch.inf)
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
    """Up to `tokens` times: the next token of every prompt, None from one of `ends` on. Stops when all rows have one.

    A row that fills the context goes on from its last half. A prompt longer than the context is read from its end.
    Prompts are not empty. `banned` tokens are never chosen.
    """
    device = model.lm_head.weight.device
    context = model.shape.context
    texts = [list(prompt[-context:]) for prompt in prompts]
    rows = torch.arange(len(texts), device=device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(texts), model.lm_head.weight.shape[0], dtype=torch.bool, device=device)
        for row, text in enumerate(texts):
            seen[row, text] = True
    never = torch.tensor(banned, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(seed)
    length = min(context, -(-(max(map(len, texts)) + tokens) // 128) * 128)  # few lengths: kernels round by them
    cache = Cache(model.shape, len(texts), length, device, model.lm_head.weight.dtype)
    # Weights that are dealt to several processes (by `unshard` they are known) come together in its own passes only.
    decoder_cls = (
        None if hasattr(model, "unshard") or tokens < 2 else {"cpu": FastDecoder, "cuda": GraphDecoder}.get(device.type)
    )
    decoder: Any = decoder_cls(model, cache) if decoder_cls else None
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
            seen[rows, chosen] = True
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


def prefill(model: Transformer, cache: Cache, texts: list[list[int]]) -> Tensor:
    """Read `texts` into an empty cache: logits (B, V) after the last token of each.

    Shorter rows are padded at their end; what is written there no query of theirs ever sees.
    """
    width = max(map(len, texts))
    device = cache.keys.device
    padded = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    cache.at(torch.arange(width, device=device).expand(len(texts), width), width)
    return model.logits(padded, cache, last=torch.tensor([len(text) - 1 for text in texts], device=device))


def continuations(
    model: Transformer,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    decode: Callable[[list[int]], str],
    seed: int = 0,
    ends: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
) -> list[str]:
    """What the model makes of each prompt, as text."""
    columns = list(generate(model, prompts, tokens, sampling, seed, ends, banned))
    return [decode([column[row] for column in columns if column[row] is not None]) for row in range(len(prompts))]  # type: ignore[misc]
