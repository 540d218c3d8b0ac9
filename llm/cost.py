"""What a model costs, by formula: parameters, and floating-point operations a token."""

import time

import torch

from llm.recipe import Model


def parameters(shape: Model, vocabulary: int) -> int:
    """Trainable numbers of a resolved shape; tied embeddings count once."""
    attention = shape.dim * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 2 * shape.head_dim
    block = attention + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
    return shape.layers * block + shape.dim + vocabulary * shape.dim * (1 if shape.tied else 2)


def flops_per_token(shape: Model, vocabulary: int) -> int:
    """Operations of forward and backward for a token of training.

    6 a weight that is multiplied, and causal attention's 6 T H E a layer.
    """
    multiplied = parameters(shape, vocabulary) - (0 if shape.tied else vocabulary * shape.dim)
    return 6 * multiplied + 6 * shape.layers * shape.context * shape.heads * shape.head_dim


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 256, seconds: float = 0.1) -> float:
    """Operations a second of this machine's own product of two square matrices in `dtype`: the best of several."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
