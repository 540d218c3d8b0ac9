"""One optimizer for all tensors: torch's AdamW and the published Muon, and a step that is masked never was."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config.schema import Train
from llm.distributed.sharding import Sharding, local_shard
from llm.model.transformer import Transformer
from llm.optim import optimizer as optimizers
from llm.optim.optimizer import (
    ADAMW_LR_FACTORS,
    BETAS,
    EPS,
    MOMENTUM,
    MUON_SCALE,
    POLYNOMIALS,
    PREFIX_STEPS,
    STACKED,
    WIDTH,
    Optimizer,
    gradient_norm,
    orthogonalised,
)
from tests import tiny

ONE, TRUE, FALSE = torch.ones(()), torch.tensor(True), torch.tensor(False)
MUON = Train(optimizer="muon", learning_rate=0.02, weight_decay=0.1)
ADAMW = Train(optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
both = pytest.mark.parametrize("train", [MUON, ADAMW], ids=["muon", "adamw"])


def model() -> Transformer:
    """Tall, wide and square matrices in the blocks, more of one shape than go into one stack."""
    return tiny.transformer(layers=STACKED // 2 + 1)


def give_gradients(model: Transformer, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale


def weights(model: Transformer) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: rows.local for name, rows in optimizer.moments.items()}


def norm(gradients: list[Tensor]) -> Tensor:
    return gradient_norm([local_shard(gradient) for gradient in gradients], Sharding())


def off(found: Tensor, true: Tensor) -> float:
    """Size of the error, relative to the size of the truth."""
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


def in_blocks(model: Transformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}


@both
@pytest.mark.parametrize("tied", [True, False])
def test_adamw_is_torchs(train: Train, tied: bool) -> None:
    """It decays matrices, alone or beside Muon, where it has shares of the rate and matrices forget over the same time."""
    ours, theirs = (tiny.transformer(layers=2, tied=tied) for _ in range(2))
    optimizer = Optimizer(ours, train)
    groups = []
    for name, p in theirs.named_parameters():
        if train is ADAMW or name not in in_blocks(theirs):
            share = (
                next((share for part, share in ADAMW_LR_FACTORS.items() if part in name), 1.0) if train is MUON else 1.0
            )
            share *= math.sqrt(WIDTH / p.shape[1]) if train is MUON and p.ndim == 2 else 1.0
            decay = train.weight_decay / share if p.ndim == 2 else 0.0
            groups.append({"params": [p], "weight_decay": decay, "share": share})
    reference = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, foreach=False)
    for step in range(5):
        share = (step + 1) / 5
        for group in reference.param_groups:
            group["lr"] = train.learning_rate * share * group["share"]
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(step, share, ONE, TRUE)
        reference.step()
    compared = {id(p) for group in groups for p in group["params"]}
    for found, true in zip(ours.parameters(), theirs.parameters(), strict=True):
        if id(true) in compared:
            assert off(found, true) < 1e-6  # the fused kernel orders its products otherwise: some roundings of 6e-8


def test_pieces_that_move_with_their_prefixes_are_vectors_of_their_own_and_of_their_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same weights come from AdamW on the vectors themselves, through whose sums the gradients pass."""
    monkeypatch.setattr(optimizers, "PREFIX_STEPS", 8)
    prefixes = torch.tensor([-1, 0, 1, 1, -1, *[4] * (tiny.VOCABULARY - 5)])
    ours = tiny.transformer(layers=1)
    embeddings = ours.model.embed_tokens.weight
    own = embeddings.detach().clone().requires_grad_()  # a piece's own vector, where all others begin at zero
    start = embeddings.detach().clone()
    optimizer = Optimizer(ours, MUON)
    optimizer.share_with_prefixes(prefixes)
    factor = ADAMW_LR_FACTORS["embed_tokens"] * math.sqrt(WIDTH / own.shape[1])
    reference = torch.optim.AdamW([own], betas=BETAS, eps=EPS, weight_decay=0.0, foreach=False)

    def whole(step: int) -> Tensor:
        with_prefix = own[prefixes.clamp(min=0)] * (prefixes >= 0)[:, None] * (1 - step / 8)
        return own + F.pad(with_prefix[:, :-1], (0, 1))  # the last feature is the bias of all

    expected = start.clone()
    for step in range(4):
        give_gradients(ours, step)
        assert embeddings.grad is not None
        before = whole(step)
        before.backward(embeddings.grad.clone())
        optimizer.step(step, 1.0, ONE, TRUE)
        reference.param_groups[0]["lr"] = rate = MUON.learning_rate * factor
        reference.step()
        reference.zero_grad()
        expected = expected * (1 - rate * MUON.weight_decay / factor) + (whole(step) - before).detach()
        assert off(embeddings.detach(), expected) < 1e-6
    give_gradients(ours, 4)
    embeddings.data[3, 4] = -0.0
    kept = weights(ours)
    optimizer.step(4, 1.0, ONE, FALSE)
    assert all(
        torch.equal(*(each.view(torch.int32) for each in pair)) for pair in zip(kept, weights(ours), strict=True)
    )


@pytest.mark.parametrize("step", [PREFIX_STEPS - 1, PREFIX_STEPS, PREFIX_STEPS + 1])
def test_after_the_first_steps_prefixes_are_left_alone(step: int) -> None:
    ours, plain = model(), model()
    first, second = Optimizer(ours, MUON), Optimizer(plain, MUON)
    first.share_with_prefixes(torch.arange(-1, tiny.VOCABULARY - 1))
    for each, optimizer in ((ours, first), (plain, second)):
        give_gradients(each, step)
        optimizer.step(step, 1.0, ONE, TRUE)
    alike = [torch.equal(a, b) for a, b in zip(weights(ours), weights(plain), strict=True)]
    assert all(alike) == (step >= PREFIX_STEPS) and alike.count(False) <= 1


def muon(weight: Tensor, gradients: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """Muon in fp64, one matrix alone, of rows of one length. The iteration is an odd polynomial of the singular values."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient, rate in zip(gradients, rates, strict=True):
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        u, s, vh = torch.linalg.svd(nesterov / nesterov.norm(dim=1, keepdim=True), full_matrices=False)
        s = s / (1.01 * (s**8).sum() ** (1 / 8))
        for a, b, c in POLYNOMIALS:
            s = a * s + b * s**3 + c * s**5
        rows, columns = weight.shape
        weight = weight * (1 - rate * decay) - rate * math.sqrt(max(1, rows / columns)) * (u * MUON_SCALE * s @ vh)
    return weight


def test_muon_is_the_published_one_on_tall_wide_and_square_matrices() -> None:
    ours = model()
    matrices = in_blocks(ours)
    assert {(p.shape[0] > p.shape[1]) - (p.shape[0] < p.shape[1]) for p in matrices.values()} == {-1, 0, 1}
    before = {name: p.detach().clone() for name, p in matrices.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in matrices}
    shares = [0.25, 0.5, 1.0, 1.0, 0.5]
    optimizer = Optimizer(ours, MUON)
    for step, share in enumerate(shares):
        give_gradients(ours, step)
        for name, p in matrices.items():
            assert p.grad is not None
            gradients[name].append(p.grad.clone())
        optimizer.step(step, share, ONE, TRUE)
    rates = [MUON.learning_rate * share for share in shares]
    for name, p in matrices.items():
        true = muon(before[name], gradients[name], rates, MUON.weight_decay)
        # Of the change, not of the weight. The polynomial's slope at small singular values, 70, enlarges 6e-8.
        assert off(p.detach() - before[name], true - before[name]) < 1e-5


def test_muon_is_torchs_but_for_the_polynomials_within_the_rounding_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda x, *of_theirs: orthogonalised(x.bfloat16()[None])[0]
    )
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, MUON, torch.bfloat16)
    matrices = in_blocks(theirs)
    reference = torch.optim.Muon(matrices.values(), lr=MUON.learning_rate, weight_decay=0.1, momentum=MOMENTUM)
    before = {name: p.detach().clone() for name, p in matrices.items()}
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(step, 1.0, ONE, TRUE)
        reference.step()
    for name, p in in_blocks(ours).items():
        assert off(p.detach() - before[name], matrices[name].detach() - before[name]) < 0.01


@pytest.mark.parametrize("shape", [(64, 64), (64, 170), (170, 64)])
def test_three_polynomials_come_as_near_to_the_orthogonal_matrix_as_the_usual_five(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    usual = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    ours = orthogonalised(matrix[None])[0]
    nearness = [torch.cosine_similarity(each.flatten(), (u @ v).flatten(), dim=0) for each in (ours, usual)]
    assert nearness[0] > nearness[1] - 0.005 and nearness[0] > 0.97
    assert float(ours.norm() / usual.norm()) == pytest.approx(1, abs=0.05), "so rates mean the same"


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64), (1, 8), (8, 1)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_orthogonalised_matrices_turn_and_do_not_stretch(shape: tuple[int, int], size: float) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * size
    found = orthogonalised(matrices)
    singular = torch.linalg.svdvals(found)
    # The published coefficients trade closeness to 1 for speed; only what is nearly singular stays small.
    assert singular.max() < 1.25
    assert singular.quantile(0.1) > 0.6
    alone = torch.cat([orthogonalised(matrix[None]) for matrix in matrices])
    assert off(found, alone) < 1e-5  # however many are stacked, to the same rounding


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit(train: Train, bad: float) -> None:
    ours = model()
    optimizer = Optimizer(ours, train)
    for step in range(2):
        give_gradients(ours, step)
        optimizer.step(step, 1.0, ONE, TRUE)
    kept = [*weights(ours), *(moment.clone() for moment in moments(optimizer).values())]
    for scale in (ONE, torch.tensor(math.nan)):  # what a norm that is not finite makes of it
        give_gradients(ours, 2)
        for p in ours.parameters():
            assert p.grad is not None
            p.grad.view(-1)[-1] = bad
        optimizer.step(2, 1.0, scale, FALSE)
        after = [*weights(ours), *moments(optimizer).values()]
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(kept, after, strict=True))
    give_gradients(ours, 3)
    optimizer.step(3, 1.0, ONE, TRUE)
    assert not any(torch.equal(a, b) for a, b in zip(kept, weights(ours), strict=False))  # and the next one moves all


@both
def test_a_first_step_that_is_not_finite_leaves_the_start(train: Train) -> None:
    """With moments of zero, and with matrices of zero as training begins with."""
    ours = Transformer(tiny.shape(), tiny.VOCABULARY)
    kept = weights(ours)
    give_gradients(ours, 0, math.nan)
    Optimizer(ours, train).step(0, 1.0, ONE, FALSE)
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(ours), strict=True))


@both
def test_scale_scales_the_gradients(train: Train) -> None:
    scaled, plain = model(), model()
    first, second = Optimizer(scaled, train), Optimizer(plain, train)
    for step in range(3):
        give_gradients(scaled, step)
        give_gradients(plain, step, 0.125)
        first.step(step, 1.0, torch.tensor(0.125), TRUE)
        second.step(step, 1.0, ONE, TRUE)
    pairs = itertools.chain(
        zip(weights(scaled), weights(plain), strict=True),
        zip(moments(first).values(), moments(second).values(), strict=True),
    )
    assert all(torch.equal(a, b) for a, b in pairs)  # a power of two rounds nothing


@both
def test_a_rate_of_zero_moves_nothing(train: Train) -> None:
    ours = model()
    kept = weights(ours)
    give_gradients(ours, 0)
    Optimizer(ours, train).step(0, 0.0, ONE, TRUE)
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(ours), strict=True))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])  # squares of the outer two do not fit fp32
def test_the_norm_is_taken_in_fp64(size: float) -> None:
    give_gradients(ours := model(), 1, size)
    gradients = [p.grad for p in ours.parameters() if p.grad is not None]
    true = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in gradients]))
    found = norm(gradients)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(true.item(), rel=1e-12)


def test_a_norm_that_is_not_finite_is_seen() -> None:
    for bad in (math.nan, math.inf):
        assert not torch.isfinite(norm([torch.ones(2, 2), torch.tensor([1.0, bad])]))


@both
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_place(train: Train, tied: bool) -> None:
    ours = tiny.transformer(layers=STACKED // 2 + 1, tied=tied)
    optimizer = Optimizer(ours, train)
    stacked = [p for stack in optimizer.stacks for p in stack.weights]
    assert sorted(map(id, [*stacked, *optimizer.adamw_params.values()])) == sorted(map(id, ours.parameters()))
    assert train is ADAMW or all(sum(part in name for part in ADAMW_LR_FACTORS) == 1 for name in optimizer.adamw_params)
    assert {id(p) for p in stacked} == ({id(p) for p in in_blocks(ours).values()} if train is MUON else set())
    assert max((len(stack.weights) for stack in optimizer.stacks), default=0) <= STACKED


@both
def test_moments_are_named_and_shaped_as_their_parameters(train: Train) -> None:
    ours = model()
    optimizer = Optimizer(ours, train)
    named = dict(ours.named_parameters())
    of_muon = set(in_blocks(ours)) if train is MUON else set()
    expected = {f"{name}/momentum" for name in of_muon} | {
        f"{name}/{moment}" for name in set(named) - of_muon for moment in ("exp_avg", "exp_avg_sq")
    }
    assert set(optimizer.moments) == expected
    assert all(moment.shape == named[name.split("/")[0]].shape for name, moment in moments(optimizer).items())


@both
def test_weights_moments_and_step_are_all_that_there_is(train: Train) -> None:
    """An optimizer made anew goes on in the same bits with the moments of the old one."""
    ours, again = model(), model()
    optimizer = Optimizer(ours, train)
    for step in range(6):
        if step == 3:
            again.load_state_dict(ours.state_dict())
            resumed = Optimizer(again, train)
            for name, moment in moments(resumed).items():
                moment.copy_(moments(optimizer)[name])
        give_gradients(ours, step)
        optimizer.step(step, 1.0, ONE, TRUE)
        if step >= 3:
            give_gradients(again, step)
            resumed.step(step, 1.0, ONE, TRUE)
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(again), strict=True))


@both
def test_what_only_a_callers_model_has_is_trained_too(train: Train) -> None:
    ours = tiny.transformer()
    ours.model.layers[0].mlp.bias = torch.nn.Parameter(torch.ones(3))  # type: ignore[union-attr]
    ours.temperature, ours.experts = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(2, 3, 4))
    optimizer, before = Optimizer(ours, train), {name: p.detach().clone() for name, p in ours.named_parameters()}
    for p in ours.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0, 1.0, torch.ones(()), torch.tensor(True))
    assert [name for name, p in ours.named_parameters() if torch.equal(p, before[name])] == []
