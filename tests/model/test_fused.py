"""The fused arithmetic of a training step is that of the modules, in value and in every gradient."""

import pytest
import torch
from torch import Tensor

from llm.model.transformer import Block, Family, places
from tests import tiny

SHAPES = {
    "all heads": tiny.shape(),
    "shared keys": tiny.shape(kv_heads=2),
    "wide heads": tiny.shape(heads=3, kv_heads=1, head_dim=54),
}


def inputs(shape: object, family: Family) -> tuple[Block, Tensor, Tensor, Tensor, Tensor | None]:
    block = Block(shape, 0, 1, family).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for weight in block.parameters():
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3 + (weight.ndim == 1)
    x = torch.randn(3, 16, block.self_attn.shape.dim, generator=generator, dtype=torch.float64)
    at, mask = places((torch.arange(48).view(3, 16) % 7 == 0).long().cumsum(1))
    angles = at[..., None] / 50 ** torch.linspace(0, 1, block.self_attn.shape.head_dim // 2, dtype=torch.float64)
    angles = angles.repeat(1, 1, 2)[:, None]
    return block, x, angles.cos(), angles.sin(), mask


def plain(block: Block, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    x = x + block.self_attn(block.input_layernorm(x), cos, sin, None, mask)
    return x + block.mlp(block.post_attention_layernorm(x))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", [Family(), Family("llama")], ids=["qwen3", "llama"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_modules(shape: object, family: Family, masked: bool) -> None:
    block, x, cos, sin, mask = inputs(shape, family)
    results = []
    for compute in (plain, lambda block, x, cos, sin, mask: block(x, cos, sin, None, None, mask)):
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = compute(block, given, cos, sin, mask if masked else None)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        results.append([y.detach(), given.grad, *(p.grad for p in block.parameters())])
    for found, true in zip(*results, strict=True):
        assert found is not None and true is not None
        assert (found - true).norm() <= 1e-12 * true.norm()


def test_in_bf16_no_gradient_is_further_off_than_the_modules_are() -> None:
    block, x, cos, sin, _ = inputs(tiny.shape(dim=128, heads=4, head_dim=32), Family())

    def gradients(compute: object, half: bool) -> list[Tensor]:
        block.zero_grad()
        given = x.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = compute(block, given, cos.float(), sin.float(), None)  # type: ignore[operator]
        y.float().square().sum().backward()
        return [each.grad.clone() for each in (given, *block.parameters()) if each.grad is not None]

    block.float()
    fused = lambda block, x, cos, sin, mask: block(x, cos, sin, None, None, mask)  # noqa: E731
    true, modules, ours = gradients(plain, False), gradients(plain, True), gradients(fused, True)
    errors = [[((a - b).norm() / b.norm()).item() for a, b in zip(each, true, strict=True)] for each in (modules, ours)]
    print([f"{a:.4f} {b:.4f}" for a, b in zip(*errors, strict=True)])
    assert all(b < 1.5 * a + 1e-3 for a, b in zip(*errors, strict=True))
