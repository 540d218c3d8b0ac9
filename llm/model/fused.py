"""Norms, rotary positions and SwiGLU of a training step on a CPU, in few passes over memory.

Without a compiler each operation reads and writes its tensors once, and autograd keeps its inputs. These functions do
the same arithmetic in about half of the passes and keep half as much for the backward pass. They work in the type of
the matrix products, to which autocast would cast their results anyway. Letters in shapes as in `transformer.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / root mean square of each row of `x` (..., n): (..., 1) of at least fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square().div(x.shape[-1]).add(eps).rsqrt()


class _NormedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        scale = _inverse_rms(x, eps)
        y = (x * scale).to(dtype)
        ctx.save_for_backward(y, scale, norm, *weights)
        return y @ _joined(norm, weights, dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y, scale, norm, *weights = ctx.saved_tensors
        of_y = gradient @ _joined(norm, weights, y.dtype)
        of_product = (gradient.flatten(0, -2).T @ y.flatten(0, -2)).to(norm.dtype)
        parts = of_product.split([len(weight) for weight in weights])
        of_norm = torch.stack([(part * weight).sum(0) for part, weight in zip(parts, weights, strict=True)]).sum(0)
        along = (of_y * y).mean(-1, keepdim=True)
        of_x = torch.addcmul(of_y, y, along, value=-1) * scale
        return of_x, of_norm, None, None, *(of_product * norm).split([len(weight) for weight in weights])


def _joined(norm: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices (each of n columns) above each other, with the norm's weight (n,) in them."""
    return (torch.cat(list(weights)) * norm).to(dtype)


def normed_product(x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> Tensor:
    """RMSNorm of `x` (..., n) with the weight `norm` (n,), times each of `weights` (rows, n): (..., sum of rows).

    The result has the type that autocast gives to products. The norm's weight is multiplied into the matrices.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights[0].dtype
    result: Tensor = _NormedProduct.apply(x, norm, eps, dtype, *weights)
    return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotary positions of `x` (B, T, H, E), or with `sign` -1 back again."""
    result, half = x * cos, x.shape[-1] // 2
    result[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-sign)
    result[..., half:].addcmul_(x[..., :half], sin[..., :half], value=sign)
    return result


class _NormedAndTurned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps).to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale, weight, cos, sin)
        return _turned(y * weight, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y, scale, weight, cos, sin = ctx.saved_tensors
        gradient = _turned(gradient, cos, sin, -1)
        products = gradient * y
        along = (products * weight).mean(-1, keepdim=True)
        of_x = torch.addcmul(gradient * weight, y, along, value=-1).mul_(scale)
        return of_x, products.sum((0, 1)), None, None, None


def normed_and_turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head of `x` (B, T, H, E) with `weight` (H, E), then rotary positions.

    cos and sin (B or 1, T, 1, E) have two equal halves.
    """
    result: Tensor = _NormedAndTurned.apply(x, weight.to(x.dtype), cos.to(x.dtype), sin.to(x.dtype), eps)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        of_gate, of_up = of_x.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return of_x


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (..., F) of `x` (..., 2 F), which holds gate and up side by side."""
    result: Tensor = _SwiGLU.apply(x)
    return result
