"""The smallest models that have everything in them."""

from collections.abc import Sequence
from typing import Any

import torch

from llm.config.reading import key_of
from llm.config.resolving import resolve
from llm.config.schema import LENGTHS, Model, Recipe, Text, Train
from llm.model.transformer import Transformer

VOCABULARY = 32


def shape(**keys: Any) -> Model:
    """A resolved shape: 16 wide, two layers, two heads over one of keys and values, context 16, but for `keys`."""
    given: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 32, "context": 16} | keys
    train = Train(steps=1, tokens_per_step=given["context"])
    return resolve(Recipe(run="tiny", text=Text(files=("-",)), model=Model(**given), train=train)).model


def transformer(seed: int = 0, vocabulary: int = VOCABULARY, **keys: Any) -> Transformer:
    """A model as if trained: no weight is zero or one, so that each of them shows in what it says."""
    return stirred(Transformer(shape(**keys), vocabulary, seed), seed)


@torch.no_grad()
def stirred(model: Transformer, seed: int = 0) -> Transformer:
    """The same model with every weight drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 + (1.0 if p.ndim == 1 else 0.0))
    return model


def ids(*size: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random tokens: int64 of `size`."""
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def with_last_length(overrides: Sequence[str]) -> list[str]:
    """The overrides with the last of their lengths alone."""
    lengths = [each for each in overrides if key_of(each) in LENGTHS]
    return [each for each in overrides if each in lengths[-1:] or each not in lengths]
