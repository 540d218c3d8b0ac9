"""One optimizer for all tensors: Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all.

It keeps nothing but moments: rates and bias corrections are functions of the step. A step whose gradient is not finite
leaves weights and moments alone, decided on the device, so that nothing waits for it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llm.config.schema import Train
from llm.distributed.sharding import LocalShard, Sharding, bounds, gather, local_shard, size

MOMENTUM = 0.9  # Muon's; the usual 0.95 looks further back than runs of some thousand steps can afford
BETAS = (0.9, 0.99)  # AdamW's; small batches want the second long
EPS = 1e-8
ADAMW_LR_FACTORS = {"embed_tokens": 1.0, "lm_head": 0.25, "norm": 0.5}  # of Muon's rate, for what Muon does not take,
WIDTH = 192  # at this width; those of matrices fall with the root of it, as ever more features add up in a logit
# a, b, c of a x + b x^3 + c x^5: three in turn bring all of 0.0127 to 1 within 20 % of 1. Each has the least maximum of
# |1 - p| over the interval that the one before leaves (Remez).
POLYNOMIALS = ((7.9883, -23.2063, 17.1169), (3.5093, -2.6294, 0.5260), (2.4945, -1.8380, 0.4372))
MUON_SCALE = 0.88  # where the five usual polynomials leave singular values, and for which rates are usually given
TINY = 1e-7
STACKED = 8  # matrices of one shape that are orthogonalised together, of at most so many
STACKED_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}  # numbers: more keep it no busier, and take six times their memory
VECTOR = 64  # numbers that every CPU's kernel takes at once, or a multiple of them


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each of `matrices` (n, rows, columns) with its singular values pushed to about LEVEL. In the type of the input.

    By odd polynomials of the singular values, as in Jordan, "Muon: an optimizer for hidden layers in neural networks",
    2024, each the best for what the one before leaves, as in Amsel and others, "The Polar Express", 2025.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + TINY)
    for step, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x @ x.mT
        square = gram @ gram
        if step == 0:  # the eighth root of the sum of the singular values' eighth powers: hardly more than the largest
            bound = 1.01 * (square.norm(dim=(1, 2), keepdim=True) + TINY).pow(0.25)
            x, gram, square = x / bound, gram / bound**2, square / bound**4
        x = torch.baddbmm(x, torch.add(gram * b, square, alpha=c), x, beta=a)
    return (x.mT if tall else x) * MUON_SCALE


def wide(device: torch.device) -> torch.dtype:
    """The type of sums that must not depend on their grouping: fp64, where the device has it (Apple's has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient_norm(gradients: list[LocalShard], sharding: Sharding) -> Tensor:
    """Euclidean norm over all `gradients`, a scalar in fp64: one sum a row, then one sum over the rows.

    So it is the same to the bit however the rows are dealt.
    """
    dtype = wide(gradients[0].local.device)
    rows = [torch.linalg.vector_norm(g.flat, dim=1, dtype=dtype) for g in gradients]
    if sharding.sharded:
        spans = [bounds(g.shape[0], sharding.shard_size, 0)[1] for g in gradients]
        padded = torch.cat([F.pad(row, (0, span - len(row))) for row, span in zip(rows, spans, strict=True)])
        columns = gather(padded, sharding.shard_group).split(spans, dim=1)
        rows = [column.flatten()[: g.shape[0]] for column, g in zip(columns, gradients, strict=True)]
    return torch.cat(rows).square().sum().sqrt()


@dataclass(frozen=True)
class Stack:
    """Up to STACKED matrices of one shape, orthogonalised together by one process; the same ones on any world.

    `momentum` (n, rows, columns) is what this process holds of them; its slices are the moments under their names.
    """

    weights: list[nn.Parameter]
    momentum: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole matrices."""
        return len(self.weights), *self.weights[0].shape


class Optimizer:
    """`moments` maps NAME/momentum, NAME/exp_avg and NAME/exp_avg_sq to tensors: all that must be saved."""

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        orthogonalise_in: torch.dtype = torch.float32,
        sharding: Sharding | None = None,
    ) -> None:
        self.train, self.sharding, self.orthogonalise_in = train, sharding or Sharding(), orthogonalise_in
        self.decay = float(train.weight_decay)
        self.moments: dict[str, LocalShard] = {}
        self.stacks: list[Stack] = []
        named = dict(model.named_parameters())
        muon = train.optimizer == "muon"
        matrices = {name: p for name, p in named.items() if muon and p.ndim == 2 and ".layers." in name}
        for _, same in groupby(sorted(matrices.items(), key=_by_shape), key=_by_shape):
            group = list(same)
            most = STACKED_NUMBERS["cuda" if group[0][1].is_cuda else "cpu"]
            count = max(1, min(STACKED, most // math.prod(group[0][1].shape)))
            for low in range(0, len(group), count):
                names, weights = zip(*group[low : low + count], strict=True)
                stack = Stack(list(weights), torch.stack([torch.zeros_like(local_shard(p).local) for p in weights]))
                for name, p, part in zip(names, weights, stack.momentum, strict=True):
                    self.moments[f"{name}/momentum"] = local_shard(p).like(part)
                self.stacks.append(stack)
        self.adamw_params = {name: p for name, p in named.items() if name not in matrices}
        for name, p in self.adamw_params.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self.moments[f"{name}/{moment}"] = local_shard(p).like(torch.zeros_like(local_shard(p).local))

    @torch.no_grad()
    def step(self, step: int, lr_factor: float, scale: Tensor, finite: Tensor) -> None:
        """Update `step` (0 is the first): gradients times `scale`, rate times `rate_share`; nothing unless `finite`.

        `scale` and `finite` are scalars on the device, an fp32 and a bool. Gradients are used up.
        """
        rate = self.train.learning_rate * lr_factor
        if self.stacks:
            self._muon(rate, scale, finite)
            for part, adamw_factor in ADAMW_LR_FACTORS.items():
                named = {name: p for name, p in self.adamw_params.items() if part in name}
                dim = next((p.shape[1] for p in named.values() if p.ndim == 2), None)
                adamw_factor *= math.sqrt(WIDTH / (dim or WIDTH))
                decay = self.decay / adamw_factor if dim else 0.0  # all matrices forget over the same time, norms never
                self._adamw(named, step, rate * adamw_factor, decay, scale, finite)
            return
        decayed = {name: p for name, p in self.adamw_params.items() if p.ndim == 2}  # norms never are
        self._adamw(decayed, step, rate, self.decay, scale, finite)
        self._adamw({n: p for n, p in self.adamw_params.items() if n not in decayed}, step, rate, 0.0, scale, finite)

    def _muon(self, rate: float, scale: Tensor, finite: Tensor) -> None:
        workers = self.sharding.shard_size if self.sharding.sharded else size()
        for low in range(0, len(self.stacks), workers):  # one for each at a time, as memory is short
            stacks, updates = self.stacks[low : low + workers], []
            for stack in stacks:
                gradient = torch.stack([_gradient(p) for p in stack.weights]).mul_(scale)
                for p in stack.weights:
                    p.grad = None
                gradient = torch.where(finite, gradient, stack.momentum)  # towards itself: the momentum stays
                stack.momentum.lerp_(gradient, 1 - MOMENTUM)
                updates.append(gradient.lerp_(stack.momentum, MOMENTUM).to(self.orthogonalise_in))
                del gradient
            for stack, update in zip(stacks, self._orthogonalised(stacks, updates), strict=True):
                _, rows, columns = stack.shape
                update = update.float().mul_(finite * (-rate * math.sqrt(max(1.0, rows / columns))))
                weights = [local_shard(p).local for p in stack.weights]
                torch._foreach_mul_(weights, 1 - finite.float() * (rate * self.decay))
                torch._foreach_add_(weights, update.unbind())

    def _orthogonalised(self, stacks: list[Stack], updates: list[Tensor]) -> list[Tensor]:
        """This process's rows of each stack's orthogonalised update; each stack is worked on by one process only."""
        sharding = self.sharding
        if sharding.sharded:
            return exchanged(updates, [stack.shape for stack in stacks], sharding, orthogonalised)
        if size() == 1:
            return [orthogonalised(update) for update in updates]
        results = []
        for index, update in enumerate(updates):
            owner = index % size()
            mine = owner == dist.get_rank()
            results.append((orthogonalised(update) if mine else torch.empty_like(update)).contiguous())
        for handle in [dist.broadcast(each, i % size(), async_op=True) for i, each in enumerate(results)]:
            handle.wait()
        return results

    def _adamw(
        self, named: dict[str, nn.Parameter], step: int, rate: float, decay: float, scale: Tensor, finite: Tensor
    ) -> None:
        # A CPU's kernel rounds the last numbers of a tensor otherwise where VECTOR does not divide it: these ends of
        # all tensors are joined to one that it divides.
        whole, ends = [], []
        for name, p in named.items():
            moments = (self.moments[f"{name}/exp_avg"], self.moments[f"{name}/exp_avg_sq"])
            flat = [local_shard(p).local.view(-1), _gradient(p).reshape(-1), *(each.local.view(-1) for each in moments)]
            end = len(flat[0]) // VECTOR * VECTOR
            whole += [[each[:end] for each in flat]] if end else []
            ends += [[each[end:] for each in flat]] if end < len(flat[0]) else []
        if ends:
            whole.append([_joined(each) for each in zip(*ends, strict=True)])
        if not whole:
            return
        weights, gradients, averages, squares = (list(each) for each in zip(*whole, strict=True))
        adamw(
            weights,
            gradients,
            averages,
            squares,
            [],
            list(torch.full((len(whole),), float(step), device=scale.device).unbind()),
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
        for which in (0, 2, 3) if ends else ():
            parts = [each[which] for each in ends]
            pieces = whole[-1][which][: sum(map(len, parts))].split([len(part) for part in parts])
            torch._foreach_copy_(parts, pieces)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All flat `parts` in one tensor of a length that VECTOR divides, with zeros at its end."""
    joined = torch.cat(list(parts))
    return F.pad(joined, (0, -len(joined) % VECTOR))


def exchanged(
    parts: list[Tensor], shapes: list[tuple[int, int, int]], sharding: Sharding, act: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """This process's rows of `act` of each whole stack, out of everybody's rows: one exchange there, one back.

    `parts`: (n, own rows, columns) of each stack; stack i, of the whole shape shapes[i], is acted on by process i
    modulo the number of parts.
    """
    owners = [index % sharding.shard_size for index in range(len(shapes))]
    mine = [shape for shape, owner in zip(shapes, owners, strict=True) if owner == sharding.index]

    def numbers(shape: tuple[int, int, int], part: int) -> int:
        low, high = bounds(shape[1], sharding.shard_size, part)
        return shape[0] * (high - low) * shape[2]

    theirs = [  # by owner: what this process holds of the owner's stacks
        sum(numbers(shape, sharding.index) for shape, owner in zip(shapes, owners, strict=True) if owner == each)
        for each in range(sharding.shard_size)
    ]
    ours = [
        sum(numbers(shape, each) for shape in mine) for each in range(sharding.shard_size)
    ]  # by holder: of our stacks
    order = sorted(range(len(parts)), key=lambda index: owners[index])  # stable: by owner, then by index
    flat = torch.cat([parts[index].flatten() for index in order])
    received = flat.new_empty(sum(ours))
    dist.all_to_all_single(received, flat, ours, theirs, group=sharding.shard_group)
    holders = [
        [
            piece.view(shape[0], numbers(shape, each) // shape[0] // shape[2], shape[2])
            for shape, piece in zip(mine, part.split([numbers(shape, each) for shape in mine]), strict=True)
        ]
        for each, part in enumerate(received.split(ours))
    ]
    wholes = [act(torch.cat(pieces, dim=1)) for pieces in zip(*holders, strict=True)]
    cut = [
        whole[:, slice(*bounds(whole.shape[1], sharding.shard_size, each))].flatten()
        for each in range(sharding.shard_size)
        for whole in wholes
    ]
    back = torch.empty_like(flat)
    dist.all_to_all_single(back, torch.cat(cut) if cut else flat.new_empty(0), theirs, ours, group=sharding.shard_group)
    results: list[Tensor] = [back] * len(parts)
    for index, piece in zip(order, back.split([parts[index].numel() for index in order]), strict=True):
        results[index] = piece.view(parts[index].shape)
    return results


def _by_shape(item: tuple[str, nn.Parameter]) -> tuple[int, ...]:
    return tuple(item[1].shape)


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return local_shard(p.grad).local
