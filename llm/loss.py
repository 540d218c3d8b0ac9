"""Cross-entropy without the (tokens x vocabulary) logits: head and loss in chunks of rows.

Gradients are made on the way forward, so nothing of the size tokens x vocabulary lives longer than its chunk. The
softmax is taken in fp32 whatever the model runs in.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 22  # logits held at once
IGNORED = -100  # a target that does not count


class _HeadAndLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if learn else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learn else None
        rows = max(1, CHUNK_NUMBERS // weight.shape[0])
        for low in range(0, hidden.shape[0], rows):
            part, target = hidden[low : low + rows], targets[low : low + rows]
            logits = (part @ head.T).float()  # (rows, vocabulary)
            counted = target != IGNORED
            index = target.where(counted, 0)[:, None]
            log_total = logits.logsumexp(-1, keepdim=True)
            total += ((log_total - logits.gather(-1, index)).squeeze(-1) * counted).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                slope = logits.sub_(log_total).exp_()  # softmax, in place
                slope.scatter_add_(-1, index, slope.new_full((), -1.0).expand(index.shape))
                slope = slope.mul_(counted[:, None]).to(hidden.dtype)
                torch.mm(slope, head, out=hidden_gradient[low : low + rows])
                if hidden.dtype == torch.float32:
                    weight_gradient.addmm_(slope.T, part)
                else:
                    weight_gradient += slope.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scales[0]
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(ctx.weight_dtype),
            None,
            None,
        )


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the targets that are not IGNORED: nats, a scalar in fp32.

    hidden (rows, dim), in the type the head is to be multiplied in; weight (vocabulary, dim); targets (rows,) of int64.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadAndLoss.apply(hidden, weight, targets, torch.is_grad_enabled())
