"""Output head and cross-entropy in chunks of rows, so that the full (tokens, vocab_size) logits never exist.

The forward pass computes the gradients too, so a chunk's logits are freed before the next. The softmax is in fp32
whatever precision the model runs in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm.base.constants import CHUNK_NUMBERS, IGNORED


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; fp16 is summed to fp32, as sums over many rows exceed 65,504 and the loss is scaled only later."""
    if a.dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits in fp32, mask of counted targets, their index, log of the softmax's denominator, and summed loss."""
    wide = logits.float()
    counted, index = _targets(targets)
    log_total = wide.logsumexp(-1, keepdim=True)
    return wide, counted, index, log_total, ((log_total - wide.gather(-1, index)) * counted).sum()


def _targets(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets count, and their index in the vocabulary: (rows, 1) each."""
    counted = (targets != IGNORED)[:, None]
    return counted, targets[:, None].where(counted, 0)


def loss_and_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss (nats) of logits (rows, vocab_size) and its gradient in their type, in place where possible.

    Each pass over the logits costs as much as a product of narrow matrices, so there are few: one exponential serves
    the sum and the gradient.
    """
    wide = logits.float()
    counted, index = _targets(targets)
    highest = wide.amax(-1, keepdim=True)
    wanted = wide.gather(-1, index) - highest
    grad_logits = wide.sub_(highest).exp_()
    total = grad_logits.sum(-1, keepdim=True)
    nats = ((total.log() - wanted) * counted).sum()
    grad_logits.mul_(counted / total)  # the softmax, or 0
    grad_logits.scatter_add_(-1, index, -counted.to(grad_logits.dtype))
    return nats, grad_logits.to(logits.dtype)


def loss_and_grad_fused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same out of place: a compiler makes one kernel of it, which reads and writes the logits once."""
    wide, counted, index, log_total, nats = _nats(logits, targets)
    hit = torch.arange(wide.shape[1], device=wide.device) == index
    return nats, (((wide - log_total).exp() - hit.float()) * counted).to(logits.dtype)


class _HeadAndLoss(torch.autograd.Function):
    learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = staticmethod(loss_and_grad)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if learn else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learn else None
        most = CHUNK_NUMBERS["cuda" if hidden.device.type == "cuda" else "cpu"]
        chunks = max(1, -(-hidden.shape[0] // max(1, most // weight.shape[0])))
        rows = max(1, -(-hidden.shape[0] // chunks))  # chunks of nearly equal size
        for low in range(0, hidden.shape[0], rows):
            part, target = hidden[low : low + rows], targets[low : low + rows]
            logits = product(part, head.T)  # (rows, vocab_size)
            if hidden_gradient is None or weight_gradient is None:
                total += _nats(logits, target)[-1]
            else:
                nats, grad_logits = _HeadAndLoss.learn(logits, target)
                total += nats
                grad_logits = grad_logits.to(head.dtype)
                torch.mm(grad_logits, head, out=hidden_gradient[low : low + rows])
                if hidden.dtype == torch.float32:
                    weight_gradient.addmm_(grad_logits.T, part)
                else:
                    weight_gradient += product(grad_logits.T, part)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        (hidden_gradient, weight_gradient), (scale,) = ctx.saved_tensors, scales
        hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        return hidden_gradient, (weight_gradient * scale).to(ctx.weight_dtype), None, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the targets that are not IGNORED: nats, an fp32 scalar.

    hidden (rows, dim), in the type of the product; weight (vocab_size, dim); targets (rows,) of int64.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadAndLoss.apply(hidden, weight, targets, torch.is_grad_enabled())


def compile_loss(wanted: bool = True) -> None:
    """Switch compilation of the training loss on or off for this process."""
    _HeadAndLoss.learn = staticmethod(torch.compile(loss_and_grad_fused) if wanted else loss_and_grad)
