"""One optimizer for all tensors: Muon for the blocks' matrices and AdamW for the rest, or AdamW for all.

Moments are its only state: learning rates and bias corrections are functions of the step. A step with a non-finite
gradient changes neither weights nor moments; this is decided on the device, without a synchronisation.
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

from llm.base.constants import STACKED, STACKED_NUMBERS
from llm.config.schema import Train
from llm.distributed.sharding import LocalShard, Sharding, bounds, gather, local_shard, size

MOMENTUM = 0.86  # Muon's; the usual 0.95 averages over too many steps for runs of a few thousand
BETAS = (0.9, 0.99)  # AdamW's; small batches need a long second average
EPS = 1e-8
# AdamW's learning rates as a fraction of Muon's, for a model of this width. Those of matrices fall with its square
# root, as a logit sums over more features.
ADAMW_LR_FACTORS = {"embed_tokens": 1.0, "lm_head": 0.25, "norm": 0.5}
OTHERS = 0.5  # of tensors that only a caller's own model has, such as a bias
WIDTH = 192
PREFIX_STEPS = 272  # updates in which the share of a prefix in the embeddings of its pieces falls from 1 to 0
# (a, b, c) of a x + b x^3 + c x^5: applied in turn, the three map 0.0127 .. 1 to within 20 % of 1. Each minimises the
# maximum of |1 - p| over the interval that the previous one leaves (Remez).
POLYNOMIALS = ((7.9883, -23.2063, 17.1169), (3.5093, -2.6294, 0.5260), (2.4945, -1.8380, 0.4372))
MUON_SCALE = 0.88  # singular values after the five usual polynomials, for which published learning rates are tuned
TINY = 1e-7
VECTOR = 64  # a multiple of every CPU kernel's vector length


def orthogonalised(matrices: Tensor) -> Tensor:
    """Bring the singular values of each of `matrices` (n, rows, columns) close to MUON_SCALE; keeps the input's type.

    Odd polynomials of the singular values, as in Jordan, "Muon: an optimizer for hidden layers in neural networks",
    2024, each optimal for the output of the previous one, as in Amsel et al., "The Polar Express", 2025.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    # Rows of one length first: features with small gradients have their share of the update (recipes/experiments.md).
    matrices = matrices / (matrices.norm(dim=2, keepdim=True) + TINY)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + TINY)
    for step, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x @ x.mT
        square = gram @ gram
        if step == 0:  # the Schatten-8 norm bounds the largest singular value closely
            bound = 1.01 * (square.norm(dim=(1, 2), keepdim=True) + TINY).pow(0.25)
            x, gram, square = x / bound, gram / bound**2, square / bound**4
        x = torch.baddbmm(x, torch.add(gram * b, square, alpha=c), x, beta=a)
    return (x.mT if tall else x) * MUON_SCALE


def wide(device: torch.device) -> torch.dtype:
    """Type for sums that must not depend on their grouping: fp64 where the device supports it (Apple's does not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient_norm(gradients: list[LocalShard], sharding: Sharding) -> Tensor:
    """Euclidean norm of all `gradients`, an fp64 scalar.

    Sums each row, then over rows, so that the bits do not depend on the sharding.
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
    """Up to STACKED matrices of one shape that one rank orthogonalises together; the same for any number of ranks.

    `momentum` (n, rows, columns) holds this rank's rows; its slices are the entries of Optimizer.moments.
    """

    weights: list[nn.Parameter]
    momentum: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the unsharded stack."""
        return len(self.weights), *self.weights[0].shape


class Optimizer:
    """`moments` maps NAME/momentum, NAME/exp_avg and NAME/exp_avg_sq to tensors: the whole state to save."""

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        orthogonalise_in: torch.dtype = torch.float32,
        sharding: Sharding | None = None,
    ) -> None:
        self.train, self.sharding, self.orthogonalise_in = train, sharding or Sharding(), orthogonalise_in
        self.decay = float(train.weight_decay)
        self.prefixes: Tensor | None = None  # of `share_with_prefixes`
        self.moments: dict[str, LocalShard] = {}
        self.stacks: list[Stack] = []
        named = dict(model.named_parameters())
        muon = train.optimizer == "muon"
        matrices = {name: p for name, p in named.items() if muon and p.ndim == 2 and ".layers." in name}
        for _, same in groupby(sorted(matrices.items(), key=_by_shape), key=_by_shape):
            self._add_stacks(list(same))
        self.adamw_params = {name: p for name, p in named.items() if name not in matrices}
        for name, p in self.adamw_params.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self.moments[f"{name}/{moment}"] = local_shard(p).like(torch.zeros_like(local_shard(p).local))

    def _add_stacks(self, group: list[tuple[str, nn.Parameter]]) -> None:
        """Divide matrices of one shape into stacks."""
        most = STACKED_NUMBERS["cuda" if group[0][1].is_cuda else "cpu"]
        count = max(1, min(STACKED, most // math.prod(group[0][1].shape)))
        for low in range(0, len(group), count):
            names, weights = zip(*group[low : low + count], strict=True)
            stack = Stack(list(weights), torch.stack([torch.zeros_like(local_shard(p).local) for p in weights]))
            for name, p, momentum in zip(names, weights, stack.momentum, strict=True):
                self.moments[f"{name}/momentum"] = local_shard(p).like(momentum)
            self.stacks.append(stack)

    def share_with_prefixes(self, prefixes: Tensor) -> None:
        """In the first updates, move the embedding of each piece with that of its prefix.

        `prefixes` (V,) are ids, -1 for none. Each embedding is trained as own + share * own of the prefix, where the
        prefix's own prefix does not count and share = 1 - step / PREFIX_STEPS. Only these sums are stored; AdamW's
        moments are those of the own vectors. For tied embeddings beside Muon.
        """
        self.prefixes = prefixes

    @torch.no_grad()
    def step(self, step: int, lr_factor: float, scale: Tensor, finite: Tensor) -> None:
        """Do update `step` (0 is the first) with gradients times `scale`, unless `finite` is false.

        `scale` (fp32) and `finite` (bool) are scalars on the device. Gradients are consumed.
        """
        rate = self.train.learning_rate * lr_factor
        if self.stacks:
            self._muon(rate, scale, finite)
            for part, factor in (*ADAMW_LR_FACTORS.items(), ("", OTHERS)):
                named = {name: p for name, p in self.adamw_params.items() if _part(name) == part}
                dim = next((p.shape[1] for p in named.values() if p.ndim == 2), None)
                factor *= math.sqrt(WIDTH / (dim or WIDTH))
                decay = self.decay / factor if dim else 0.0  # the same decay per step for all matrices, none for norms
                shares = part == "embed_tokens" and self.prefixes is not None and step < PREFIX_STEPS
                update = self._shared_adamw if shares else self._adamw
                update(named, step, rate * factor, decay, scale, finite)
            return
        decayed = {name: p for name, p in self.adamw_params.items() if p.ndim == 2}  # not the norms
        self._adamw(decayed, step, rate, self.decay, scale, finite)
        self._adamw({n: p for n, p in self.adamw_params.items() if n not in decayed}, step, rate, 0.0, scale, finite)

    def _muon(self, rate: float, scale: Tensor, finite: Tensor) -> None:
        workers = self.sharding.shard_size if self.sharding.sharded else size()
        for low in range(0, len(self.stacks), workers):  # one stack per rank at a time, to save memory
            stacks, updates = self.stacks[low : low + workers], []
            for stack in stacks:
                gradient = torch.stack([_gradient(p) for p in stack.weights]).mul_(scale)
                for p in stack.weights:
                    p.grad = None
                gradient = torch.where(finite, gradient, stack.momentum)  # lerp towards itself: the momentum stays
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
        """This rank's rows of each stack's orthogonalised update; only one rank computes each stack."""
        if self.sharding.sharded:
            return exchanged(updates, [stack.shape for stack in stacks], self.sharding, orthogonalised)
        if size() == 1:
            return [orthogonalised(update) for update in updates]
        results = []
        for index, update in enumerate(updates):
            mine = index % size() == dist.get_rank()
            results.append((orthogonalised(update) if mine else torch.empty_like(update)).contiguous())
        for handle in [dist.broadcast(each, i % size(), async_op=True) for i, each in enumerate(results)]:
            handle.wait()
        return results

    def _shared_adamw(
        self, named: dict[str, nn.Parameter], step: int, rate: float, decay: float, scale: Tensor, finite: Tensor
    ) -> None:
        """AdamW on each embedding's own vector, then the same move, times the share, for the pieces that it begins."""
        assert self.prefixes is not None
        (p,), prefixes = named.values(), self.prefixes.clamp(min=0)
        weight, shares = local_shard(p), (self.prefixes >= 0)[:, None] * (1 - step / PREFIX_STEPS)  # (V, 1)
        rows, gradient = slice(weight.low, weight.low + len(weight.local)), weight.like(_gradient(p))
        theirs = without_bias_(self.sharding.gather_whole(gradient) * shares)  # (V, dim): the prefixes' part
        # As in an embedding's backward pass, whose order of summing is fixed.
        gradient.local.add_(torch.ops.aten.embedding_dense_backward(theirs, prefixes, p.shape[0], -1, False)[rows])
        del theirs
        before = weight.local * (1 - finite.float() * (rate * decay))  # decayed, as each row decays by itself alone
        self._adamw(named, step, rate, decay, scale, finite)
        decrease = self.sharding.gather_whole(weight.like(before.sub_(weight.local)))  # (V, dim): 0 where masked
        weight.local.sub_(without_bias_(decrease[prefixes[rows]].mul_(shares[rows])))  # subtracting 0 keeps -0.0 too

    def _adamw(
        self, named: dict[str, nn.Parameter], step: int, rate: float, decay: float, scale: Tensor, finite: Tensor
    ) -> None:
        # CPU kernels round the last numbers of a tensor differently if VECTOR does not divide its length, so the
        # remainders of all tensors are joined into one padded tensor.
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
        steps = list(torch.full((len(whole),), float(step), device=scale.device).unbind())
        beta1, beta2 = BETAS
        adamw(
            weights, gradients, averages, squares, [], steps, fused=True, grad_scale=1 / scale,
            found_inf=(~finite).float(), amsgrad=False, beta1=beta1, beta2=beta2, lr=rate, weight_decay=decay, eps=EPS,
            maximize=False)  # fmt: skip
        for which in (0, 2, 3) if ends else ():
            parts = [each[which] for each in ends]
            pieces = whole[-1][which][: sum(map(len, parts))].split([len(part) for part in parts])
            torch._foreach_copy_(parts, pieces)


def without_bias_(change: Tensor) -> Tensor:
    """Zero the last feature of `change` (rows, dim): that of the bias (Transformer.start_with_bias), common to all."""
    change[:, -1] = 0
    return change


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation of the flat `parts`, zero-padded to a multiple of VECTOR."""
    joined = torch.cat(list(parts))
    return F.pad(joined, (0, -len(joined) % VECTOR))


def exchanged(
    parts: list[Tensor], shapes: list[tuple[int, int, int]], sharding: Sharding, act: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `act` to each whole stack on one rank; returns this rank's rows. One all-to-all there, one back.

    `parts` holds this rank's rows (n, rows, columns) of each stack. Rank i modulo shard_size owns stack i, of the whole
    shape shapes[i].
    """
    ranks = range(sharding.shard_size)
    owners = [index % sharding.shard_size for index in range(len(shapes))]
    mine = [shape for shape, owner in zip(shapes, owners, strict=True) if owner == sharding.index]

    def numbers(shape: tuple[int, int, int], rank: int) -> int:
        low, high = bounds(shape[1], sharding.shard_size, rank)
        return shape[0] * (high - low) * shape[2]

    theirs = [  # by owner: numbers that this rank holds of the owner's stacks
        sum(numbers(shape, sharding.index) for shape, owner in zip(shapes, owners, strict=True) if owner == rank)
        for rank in ranks
    ]
    ours = [sum(numbers(shape, rank) for shape in mine) for rank in ranks]  # by holder: numbers of this rank's stacks
    order = sorted(range(len(parts)), key=lambda index: owners[index])  # stable: by owner, then by index
    flat = torch.cat([parts[index].flatten() for index in order])
    received = flat.new_empty(sum(ours))
    dist.all_to_all_single(received, flat, ours, theirs, group=sharding.shard_group)
    holders = [
        [
            piece.view(shape[0], numbers(shape, rank) // shape[0] // shape[2], shape[2])
            for shape, piece in zip(mine, part.split([numbers(shape, rank) for shape in mine]), strict=True)
        ]
        for rank, part in enumerate(received.split(ours))
    ]
    wholes = [act(torch.cat(pieces, dim=1)) for pieces in zip(*holders, strict=True)]
    cut = [
        whole[:, slice(*bounds(whole.shape[1], sharding.shard_size, rank))].flatten()
        for rank in ranks
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


def _part(name: str) -> str:
    """The key of ADAMW_LR_FACTORS in a tensor's name; empty for what only a caller's own model has."""
    return next((part for part in ADAMW_LR_FACTORS if part in name), "")


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return local_shard(p.grad).local
