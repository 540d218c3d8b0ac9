"""Attention of a training step, with a backward pass of our own where that is faster: short windows, in bf16, on a CPU.

At 512 tokens torch's backward pass takes 1.3 to 1.9 times as long as this one (tests/benchmarks/README.md). Letters in
shapes: B windows, H heads, K kv_heads, T tokens, E head_dim, N windows times heads.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.model.operation import operation

MOST_TOKENS = 512  # of a window; from 1,024 on torch's backward pass is as fast
KEYS = 256  # in a block of scores; queries before the first of them do not see the block
SCORES = 1 << 21  # in a block, over several heads; the fastest of four sizes


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention (B, H, T, E) of q (B, H, T, E) to k and v (B, K, T, E); H is a multiple of K.

    `mask` (B, 1, T, T) is true where a query (third) sees a key (last); without it each query sees the keys up to its
    own position.
    """
    device, grouped = q.device.type, k.shape[1] < q.shape[1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    suits = device == "cpu" and dtype is torch.bfloat16 and mask is None and k.shape == q.shape
    dense = all(each.stride(-1) == 1 for each in (q, k, v))  # as torch's kernel wants them
    if suits and dense and 0 < q.shape[2] <= MOST_TOKENS and torch.is_grad_enabled():
        result: Tensor = _CausalAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype))
        return result
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(gradient, *ctx.saved_tensors)


@operation
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of their causal attention `y`; (B, H, T, E) each.

    `lse` (B, H, T) is the logarithm of the sum of exponentials of each query's scores.
    """
    windows, heads, tokens, features = q.shape
    count, scale = windows * heads, features**-0.5
    # Products are rounded to bf16. `lse` and `mean` are subtracted inside of them, as two more features, so that
    # logarithms of probabilities are rounded instead of scores: where a probability is large, they are small.
    mean = (gradient.float() * y).sum(-1)  # (B, H, T): of the gradients of a query's scores, weighed by probability
    q, gradient = _with_value(q, lse / scale), _with_value(gradient, mean)  # (N, T, E + 2)
    k, v = (F.pad(each, (0, 2), value=-1.0).flatten(0, 1) for each in (k, v))  # (N, T, E + 2): what subtracts it
    of_q, of_k, of_v = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    most = min(count, max(1, SCORES // (KEYS * tokens)))
    scratch = q.new_empty(2, most * KEYS * tokens)
    for first in range(0, count, most):
        n = slice(first, min(first + most, count))
        for low in range(0, tokens, KEYS):
            keys, queries = slice(low, min(low + KEYS, tokens)), slice(low, tokens)
            size = (n.stop - first, keys.stop - low, tokens - low)
            p, of_scores = (each[: math.prod(size)].view(size) for each in scratch)  # (n, keys, queries)
            torch.baddbmm(p, k[n, keys], q[n, queries].mT, beta=0, alpha=scale, out=p).exp_()
            p[:, :, : size[1]].triu_()  # a key is seen from its own position on
            torch.baddbmm(of_scores, v[n, keys], gradient[n, queries].mT, beta=0, alpha=scale, out=of_scores).mul_(p)
            of_v[n, keys] = torch.bmm(p, gradient[n, queries])
            of_k[n, keys] = torch.bmm(of_scores, q[n, queries])
            of_q[n, queries] += torch.bmm(of_scores.mT, k[n, keys])
    of_q, of_k, of_v = (
        each.view(windows, heads, tokens, -1)[..., :features] for each in (of_q.to(k.dtype), of_k, of_v)
    )
    return of_q, of_k, of_v


@torch.library.register_fake("llm::attention_backward")
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    padded = q.new_empty(*q.shape[:-1], q.shape[-1] + 2)
    return tuple(torch.empty_like(padded)[..., :-2] for _ in range(3))


def _with_value(x: Tensor, value: Tensor) -> Tensor:
    """`x` (B, H, T, E) with `value` (B, H, T) as two more features, its bf16 and the rest of it: (N, T, E + 2)."""
    result = x.new_empty(*x.shape[:-1], x.shape[-1] + 2)
    result[..., :-2] = x
    result[..., -2] = value
    result[..., -1] = value - result[..., -2]
    return result.flatten(0, 1)
