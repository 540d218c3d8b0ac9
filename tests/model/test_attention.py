"""The backward pass of causal attention in bf16 on a CPU: gradients as exact as bf16 allows, in blocks or in one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model import attention as module
from llm.model.attention import attention

SHAPES = {  # windows, heads, tokens, features
    "one block": (2, 3, 200, 64),
    "blocks, the last one shorter": (2, 7, 500, 54),
    "one token": (1, 1, 1, 16),
}


def inputs(shape: tuple[int, ...], sharpness: float = 0) -> list[Tensor]:
    """q, k, v and a gradient; q and k of length `sharpness` times the root of their features, with a large one."""
    windows, heads, tokens, features = shape
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(windows, tokens, heads, features, generator=generator).transpose(1, 2) for _ in range(4)]
    if sharpness:
        for each in drawn[:2]:
            each[..., 3] += 5
            each *= sharpness / each.square().mean(-1, keepdim=True).sqrt()
    return [each.bfloat16() for each in drawn]


def gradients(compute: object, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    given = [each.clone().requires_grad_() for each in (q, k, v)]
    y = compute(*given)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, given, gradient.to(y.dtype))]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, None)


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-2))  # a lone token's are zero


@pytest.mark.parametrize("sharpness", [0, 1.25, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_fp64_within_one_and_a_half_percent(
    shape: tuple[int, ...], sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES", 300_000)  # so that heads come in several turns
    given = inputs(shape, sharpness)
    true = gradients(torchs, *(each.double() for each in given))
    errors = [error(found, each) for found, each in zip(gradients(ours, *given), true, strict=True)]
    theirs = [error(found, each) for found, each in zip(gradients(torchs, *given), true, strict=True)]
    print(shape, sharpness, [f"{a:.4f} {b:.4f}" for a, b in zip(errors, theirs, strict=True)])
    assert errors[0] == theirs[0] and max(errors) < 0.015


def test_no_token_has_a_gradient_from_an_earlier_query() -> None:
    q, k, v, gradient = inputs((1, 2, 500, 64))
    q *= 30  # scores of later keys overflow an exponential
    gradient[:, :, 300:] = 0
    _, of_q, of_k, of_v = gradients(ours, q, k, v, gradient)
    assert not of_q[:, :, 300:].any() and not of_k[:, :, 300:].any() and not of_v[:, :, 300:].any()
    assert all(each.isfinite().all() and each.any() for each in (of_q, of_k, of_v))


def test_under_autocast_fp32_inputs_are_treated_alike() -> None:
    given = inputs(SHAPES["one block"])
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(ours, *(each.float() for each in given[:3]), given[3])
    for a, b in zip(found, gradients(ours, *given), strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("case", ["fp32", "fp64", "long windows", "shared keys", "strided features"])
def test_elsewhere_it_is_torchs_attention(case: str) -> None:
    given = inputs((2, 4, 600 if case == "long windows" else 300, 32))
    if case.startswith("fp"):
        given = [each.to({"fp32": torch.float32, "fp64": torch.float64}[case]) for each in given]
    if case == "shared keys":
        given[1:3] = [each[:, ::2] for each in given[1:3]]
    if case == "strided features":
        given[:3] = [each.mT.contiguous().mT for each in given[:3]]
    for a, b in zip(gradients(ours, *given), gradients(torchs, *given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_windows_bits_do_not_depend_on_the_windows_beside_it(shape: tuple[int, ...]) -> None:
    given = inputs(shape)
    alone = [gradients(ours, *(each[n : n + 1] for each in given)) for n in range(shape[0])]
    for index, whole in enumerate(gradients(ours, *given)):
        assert torch.equal(whole, torch.cat([each[index] for each in alone]))
