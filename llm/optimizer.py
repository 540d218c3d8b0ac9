"""One optimizer for all tensors: Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all.

It keeps nothing but moments: rates and bias corrections are functions of the step. A step whose gradient is not finite
leaves weights and moments alone, decided on the device, so that nothing waits for it.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llm.recipe import Train

MOMENTUM = 0.95  # Muon's
BETAS = (0.9, 0.95)  # AdamW's
EPS = 1e-8
ADAMW_SHARE = 0.15  # of Muon's rate, for what Muon does not take
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STACKED = 8  # matrices of one shape that are orthogonalised together


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each of `matrices` (n, rows, columns) with its singular values pushed to about 1.

    By Newton and Schulz's iteration: Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024. In the
    type of the input.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm over all `gradients`, an fp64 scalar: one sum a row, then one sum over the rows."""
    rows = [
        torch.linalg.vector_norm(g.flatten(1) if g.ndim > 1 else g[:, None], dim=1, dtype=torch.float64)
        for g in gradients
    ]
    return torch.cat(rows).square().sum().sqrt()


@dataclass(frozen=True)
class Stack:
    """Up to STACKED matrices of one shape; `momentum` (n, rows, columns) is shared with the moments of their names."""

    weights: list[Tensor]
    momentum: Tensor


class Optimizer:
    """`moments` maps NAME/momentum, NAME/exp_avg and NAME/exp_avg_sq to tensors: all that must be saved."""

    def __init__(self, model: nn.Module, train: Train, orthogonalise_in: torch.dtype = torch.float32) -> None:
        self.train, self.orthogonalise_in = train, orthogonalise_in
        self.moments: dict[str, Tensor] = {}
        self.stacks: list[Stack] = []
        named = dict(model.named_parameters())
        matrices = {
            name: p for name, p in named.items() if train.optimizer == "muon" and p.ndim == 2 and ".layers." in name
        }
        for _, same in groupby(
            sorted(matrices.items(), key=lambda item: item[1].shape), key=lambda item: item[1].shape
        ):
            group = list(same)
            for low in range(0, len(group), STACKED):
                names, weights = zip(*group[low : low + STACKED], strict=True)
                stack = Stack(list(weights), torch.stack([torch.zeros_like(p, requires_grad=False) for p in weights]))
                self.moments.update(
                    {f"{name}/momentum": part for name, part in zip(names, stack.momentum, strict=True)}
                )
                self.stacks.append(stack)
        rest = {name: p for name, p in named.items() if name not in matrices}
        for name, p in rest.items():
            self.moments[f"{name}/exp_avg"] = torch.zeros_like(p, requires_grad=False)
            self.moments[f"{name}/exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
        # Norms are never decayed; nor, beside Muon, embeddings, whose rare rows would only shrink.
        decayed = {name for name, p in rest.items() if p.ndim == 2 and train.optimizer == "adamw"}
        self.groups = [
            ({name: rest[name] for name in rest if (name in decayed) == chosen}, train.weight_decay if chosen else 0.0)
            for chosen in (True, False)
        ]

    @torch.no_grad()
    def step(self, step: int, rate_share: float, scale: Tensor, finite: Tensor) -> None:
        """Update `step` (0 is the first): gradients times `scale`, the recipe's rate times `rate_share`.

        Nothing at all unless `finite`.
        `scale` and `finite` are scalars on the device, an fp32 and a bool. Gradients are used up.
        """
        rate = self.train.learning_rate * rate_share
        for stack in self.stacks:
            self._muon(stack, rate, scale, finite)
        for named, decay in self.groups:
            self._adamw(named, step, rate * (ADAMW_SHARE if self.stacks else 1.0), decay, scale, finite)

    def _muon(self, stack: Stack, rate: float, scale: Tensor, finite: Tensor) -> None:
        gradient = torch.stack([_gradient(p) for p in stack.weights]).mul_(scale)
        gradient = torch.where(finite, gradient, stack.momentum)  # towards itself: the momentum stays
        stack.momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalised(gradient.lerp_(stack.momentum, MOMENTUM).to(self.orthogonalise_in)).float()
        rows, columns = update.shape[1:]
        update *= finite * (-rate * math.sqrt(max(1.0, rows / columns)))
        torch._foreach_mul_(stack.weights, 1 - finite.float() * (rate * self.train.weight_decay))
        torch._foreach_add_(stack.weights, update.unbind())

    def _adamw(
        self, named: dict[str, nn.Parameter], step: int, rate: float, decay: float, scale: Tensor, finite: Tensor
    ) -> None:
        if not named:
            return
        weights: list[Tensor] = list(named.values())
        steps = list(torch.full((len(weights),), float(step), device=scale.device).unbind())
        adamw(
            weights,
            [_gradient(p) for p in weights],
            [self.moments[f"{name}/exp_avg"] for name in named],
            [self.moments[f"{name}/exp_avg_sq"] for name in named],
            [],
            steps,
            fused=True,
            grad_scale=1 / scale,
            found_inf=(~finite).float(),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=decay,
            eps=EPS,
            maximize=False,
        )


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
