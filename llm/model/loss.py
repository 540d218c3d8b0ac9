"""Output head and cross-entropy in chunks of rows, so that the full (tokens, vocab_size) logits never exist.

The forward pass computes the gradients too, so a chunk's logits are freed before the next. The softmax is in fp32
whatever precision the model runs in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from llm.base.constants import CACHED_NUMBERS, CHUNK_NUMBERS, IGNORED


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
    """Summed loss (nats) of logits (rows, vocab_size) and its gradient, which replaces them.

    Each pass over the logits costs as much as a product of narrow matrices, so there are few: one exponential serves
    the sum and the gradient. A CPU takes them in blocks of rows that stay in a core's cache.
    """
    rows = len(logits) if logits.is_cuda else max(1, CACHED_NUMBERS // logits.shape[1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([_to_gradient(part, target) for part, target in parts]).sum(), logits


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace `logits` by the gradient of their summed loss, which is returned."""
    wide = logits.float()
    counted, index = _targets(targets)
    highest = wide.amax(-1, keepdim=True)
    wanted = wide.gather(-1, index) - highest
    gradient = wide.sub_(highest).exp_()
    total = gradient.sum(-1, keepdim=True)
    nats = ((total.log() - wanted) * counted).sum()
    gradient.mul_(counted / total)  # the softmax, or 0
    gradient.scatter_add_(-1, index, -counted.to(gradient.dtype))
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    return nats


def loss_and_grad_fused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same out of place: a compiler makes one kernel of it, which reads and writes the logits once."""
    wide, counted, index, log_total, nats = _nats(logits, targets)
    hit = torch.arange(wide.shape[1], device=wide.device) == index
    return nats, (((wide - log_total).exp() - hit.float()) * counted).to(logits.dtype)


@dataclass(frozen=True)
class Sampled:
    """The pieces that a sampled softmax covers beside each row's target: `pieces` (n,), all different, of int64.

    `log_weights` (n,) of fp32: a piece of weight w stands for w pieces of the vocabulary.
    """

    pieces: Tensor
    log_weights: Tensor

    def logits(self, part: Tensor, head: Tensor, target: Tensor, own: Tensor) -> Tensor:
        """Logits (rows, 1 + n) in fp32, each row's target first and not among the rest."""
        rest = product(part, head.T).float() + self.log_weights
        rest.masked_fill_(self.pieces == target[:, None], float("-inf"))
        first = (part.float() * own.float()).sum(-1, keepdim=True)
        return torch.cat([first, rest], dim=1)


@dataclass(frozen=True)
class Head:
    """The output matrix `weight` (vocab_size, dim) in the type `dtype`, or the rows of it that `sampled` needs."""

    weight: Tensor
    sampled: Sampled | None
    dtype: torch.dtype

    @cached_property
    def covered(self) -> Tensor:
        return (self.weight if self.sampled is None else self.weight[self.sampled.pieces]).to(self.dtype)

    def own(self, target: Tensor) -> Tensor:
        """The rows of the targets."""
        return self.weight[target.clamp(min=0)].to(self.dtype)

    def logits(self, part: Tensor, target: Tensor) -> Tensor:
        """Logits (rows, vocab_size) of hidden states `part` (rows, dim); of Sampled.logits where it is sampled."""
        if self.sampled is None:
            return product(part, self.covered.T)
        return self.sampled.logits(part, self.covered, target, self.own(target))


@dataclass(frozen=True)
class Teachers:
    """`states` (rows, dim) and `heads` (vocab_size, dim) of each teacher, for the rows that the model learns from.

    The mean of their probabilities takes the place of each target with the weight `share`, in 0 .. 1.
    """

    states: list[Tensor]
    heads: list[Tensor]
    share: float


def taught(gradient: Tensor, targets: Tensor, probabilities: Tensor, share: float) -> Tensor:
    """The `gradient` (rows, vocab_size) of the loss, with `share` of each target dealt out by `probabilities`."""
    counted, index = _targets(targets)
    weight = counted.float() * share
    return torch.addcmul(gradient.float(), probabilities, weight, value=-1).scatter_add_(-1, index, weight)


class _HeadAndLoss(torch.autograd.Function):
    learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = staticmethod(loss_and_grad)

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        learn: bool,
        sampled: Sampled | None,
        teachers: Teachers | None,
    ) -> Tensor:
        head = Head(weight, sampled, hidden.dtype)
        heads = [Head(each, sampled, hidden.dtype) for each in (teachers.heads if teachers else [])]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if learn else None
        weight_gradient = torch.zeros(head.covered.shape, dtype=torch.float32, device=weight.device) if learn else None
        own_gradient = []  # of the targets' rows, where the softmax is sampled
        most = CHUNK_NUMBERS["cuda" if hidden.device.type == "cuda" else "cpu"]
        chunks = max(1, -(-hidden.shape[0] // max(1, most // weight.shape[0])))
        rows = max(1, -(-hidden.shape[0] // chunks))  # chunks of nearly equal size
        for low in range(0, hidden.shape[0], rows):
            part, target = hidden[low : low + rows], targets[low : low + rows]
            logits = head.logits(part, target)
            index = target if sampled is None else target.where(target == IGNORED, 0)  # of the target in a row
            if hidden_gradient is None or weight_gradient is None:
                total += _nats(logits, index)[-1]
                continue
            nats, grad_logits = _HeadAndLoss.learn(logits, index)
            total += nats
            if teachers:
                parts = [states[low : low + rows].to(hidden.dtype) for states in teachers.states]
                said = [each.logits(part_, target) for part_, each in zip(parts, heads, strict=True)]
                mean = reduce(torch.add, [each.float().softmax(-1) for each in said]) / len(said)
                grad_logits = taught(grad_logits, index, mean, teachers.share)
            grad_logits = grad_logits.to(hidden.dtype)
            first, rest = (None, grad_logits) if sampled is None else grad_logits.tensor_split([1], dim=1)
            torch.mm(rest, head.covered, out=hidden_gradient[low : low + rows])
            if first is not None:
                hidden_gradient[low : low + rows].addcmul_(first, head.own(target))
                own_gradient.append(first.float() * part.float())
            if hidden.dtype == torch.float32:
                weight_gradient.addmm_(rest.T, part)
            else:
                weight_gradient += product(rest.T, part)
        if sampled is not None and weight_gradient is not None:
            weight_gradient = _spread(
                weight_gradient, sampled.pieces, torch.cat(own_gradient), targets, weight.shape[0]
            )
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        (hidden_gradient, weight_gradient), (scale,) = ctx.saved_tensors, scales
        hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        return hidden_gradient, (weight_gradient * scale).to(ctx.weight_dtype), None, None, None, None


def _spread(rest: Tensor, pieces: Tensor, own: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The gradient (vocab_size, dim) of all rows: `rest` (n, dim) of `pieces`, and `own` (rows, dim) of the targets.

    The embedding's own backward sums rows of one piece in a fixed order on any device.
    """
    whole = torch.ops.aten.embedding_dense_backward(own, targets.clamp(min=0), vocab_size, -1, False)
    return whole.index_add_(0, pieces, rest)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sampled: Sampled | None = None,
    teachers: Teachers | None = None,
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the targets that are not IGNORED: nats, an fp32 scalar.

    hidden (rows, dim), in the type of the product; weight (vocab_size, dim); targets (rows,) of int64. With `sampled`
    the softmax covers these pieces and each row's target only, an estimate (Bengio and Senécal, "Adaptive importance
    sampling to accelerate training of a neural probabilistic language model", 2008). With `teachers` the gradient is
    that of the loss against their probabilities too, over the same pieces; the value stays that of the targets.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadAndLoss.apply(hidden, weight, targets, torch.is_grad_enabled(), sampled, teachers)


def compile_loss(wanted: bool = True) -> None:
    """Switch compilation of the training loss on or off for this process."""
    _HeadAndLoss.learn = staticmethod(torch.compile(loss_and_grad_fused) if wanted else loss_and_grad)
