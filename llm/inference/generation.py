"""Text generation: prefill, choose, step, repeat. Rows may differ in length; each keeps its own position."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Generator, Tensor

from llm.base.hashing import mix
from llm.data.chat_template import ChatTemplate
from llm.data.tokenizer import Tokenizer
from llm.inference.sampling import Sampling
from llm.inference.slots import Slots
from llm.model.transformer import Transformer

COLDEST = torch.finfo(torch.float32).tiny  # below it dividing by the temperature overflows: choose greedily


def choose(
    logits: Tensor, occurred: Sequence[AbstractSet[int]], sampling: Sampling, generators: Sequence[Generator]
) -> Tensor:
    """Sample the next token of each row: (B,) from logits (B, V), with a generator for each row.

    `occurred` are the tokens of each row's text, for the repetition penalty.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = _punished(logits, occurred, sampling.repetition_penalty)
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    # On the CPU, so that a seed gives the same text on any device; CUDA also lacks some deterministic kernels.
    device, logits = logits.device, logits.cpu()
    shares = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)  # finite at any temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        shares = shares * (shares >= shares.topk(sampling.top_k, dim=-1).values[:, -1:])
        shares = shares / shares.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        shares = shares * (shares >= _least(shares, sampling.top_p))
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.amax(-1, keepdim=True))
    drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=each) for each in generators])[:, None]
    sums = shares.cumsum(-1, dtype=torch.float64)
    places = torch.minimum(drawn * sums[:, -1:], sums[:, -1:].nextafter(torch.zeros((), dtype=torch.float64)))
    return torch.searchsorted(sums, places, right=True)[:, 0].to(device)


def _punished(logits: Tensor, occurred: Sequence[AbstractSet[int]], penalty: float) -> Tensor:
    """`logits` (B, V) with those of the tokens that occurred divided by the penalty, or multiplied if negative."""
    size = logits.shape[1]
    places = [row * size + id for row, ids in enumerate(occurred) for id in ids]
    at = torch.tensor(places, dtype=torch.int64, device=logits.device)
    flat = logits.flatten()
    old = flat.index_select(0, at)
    return flat.index_copy(0, at, torch.where(old > 0, old / penalty, old * penalty)).view(logits.shape)


def _least(shares: Tensor, top_p: float) -> Tensor:
    """The smallest of the largest shares that hold `top_p` together: (B, 1)."""
    for count in (256, shares.shape[-1]):  # a few hundred nearly always do
        if count > shares.shape[-1]:
            continue
        ordered = shares.topk(count, dim=-1).values
        sums = ordered.cumsum(-1)
        if count == shares.shape[-1] or bool((sums[:, -1] > top_p).all()):
            break
    late = sums - ordered > top_p  # those before it already hold enough
    return ordered.masked_fill(late, torch.inf).amin(-1, keepdim=True)


def generator_of(seed: int, row: int = 0) -> Generator:
    """The random numbers of one of several texts of a seed; the first has the seed itself."""
    return Generator().manual_seed(mix(seed, row) >> 1 if row else seed)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    seed: int = 0,
    ends: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
    *,
    fixed: bool = True,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, up to `tokens` times; a row yields None from one of `ends` on.

    Stops once all rows have ended. A row that fills the context continues from its last half; of a longer prompt only
    the last `context` tokens are read. Prompts must not be empty. `banned` tokens are never chosen. A row's text does
    not depend on the other prompts, to the bit unless `fixed` is false, which saves memory (see Slots).
    """
    if not tokens:
        return
    device, context = model.lm_head.weight.device, model.shape.context
    texts = [list(prompt[-context:]) for prompt in prompts]
    occurred = [set(text) for text in texts]
    never = torch.tensor(banned, dtype=torch.int64, device=device)
    generators = [generator_of(seed, row) for row in range(len(texts))]
    slots = Slots(model, len(texts), min(context, max(map(len, texts)) + tokens), fixed=fixed)
    rows = list(range(len(texts)))  # that go on
    said: dict[int, int] = {}  # their last tokens
    for _ in range(tokens):
        logits = _advance(slots, texts, rows, said)
        if banned:
            logits = logits.index_fill(1, never, -torch.inf)
        texts_of_rows, generators_of_rows = [occurred[row] for row in rows], [generators[row] for row in rows]
        chosen = dict(zip(rows, choose(logits, texts_of_rows, sampling, generators_of_rows).tolist(), strict=True))
        for row, token in chosen.items():
            occurred[row].add(token)
        said = {row: token for row, token in chosen.items() if token not in ends}
        yield [said.get(row) for row in range(len(texts))]
        rows = list(said)
        if not rows:
            return


def _advance(slots: Slots, texts: list[list[int]], rows: list[int], said: dict[int, int]) -> Tensor:
    """Logits (B, V) of `rows` after the tokens `said`, which are appended to `texts`; at first after the texts."""
    context = slots.model.shape.context
    for row, token in said.items():
        texts[row].append(token)
    full = [row for row in rows if len(texts[row]) > context]
    going = {row: said[row] for row in rows if said and row not in full}
    found = dict(zip(going, slots.step(going), strict=True)) if going else {}
    for row in full:
        texts[row] = texts[row][-(context // 2) :]
    found |= slots.join({row: texts[row] for row in rows if row not in found})
    return torch.stack([found[row] for row in rows])


def continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    tokens: int,
    sampling: Sampling,
    seed: int = 0,
    template: ChatTemplate | None = None,
    *,
    fixed: bool = True,
) -> list[str]:
    """Generated text for each prompt. A `template` decides which tokens end an answer and which it never holds."""
    by = template or tokenizer
    columns = list(generate(model, prompts, tokens, sampling, seed, by.ends, by.banned, fixed=fixed))
    rows = ([column[row] for column in columns] for row in range(len(prompts)))
    return [tokenizer.decode([token for token in row if token is not None]) for row in rows]
