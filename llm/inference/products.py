"""Products of a few rows with a matrix of weights on a CPU, in which each row's bits ignore the rows beside it.

In fp32 with AVX-512, MKL's kernel adds the terms of a row in one order from two rows on. Without, it does so from four
on, and large matrices are kept in oneDNN's blocked order instead, whose kernel does so for nearly any number. In int8
sums are of integers, hence exact; each row of the input is scaled by its own largest value and rounded to 8 bits, or to
7 where the kernel would clip sums.
"""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.backends import mkldnn

PACKED = 1 << 18  # numbers from which the blocked order is faster
ROWS = 16  # for which blocks are laid out
TINY = 1e-30  # of a row of zeros
ENGINE = "fbgemm"  # torch's int8 kernels for x86-64, with and without VNNI


def unit(x: Tensor, least: Tensor) -> Tensor:
    """RMSNorm without its weight and the factor sqrt(size): three calls, where the fused one takes ten on a CPU.

    `least` is sqrt(size * epsilon).
    """
    return x / _norm(x, least)


def _norm(x: Tensor, least: Tensor) -> Tensor:
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)


class Product:
    """The product of x (B, inputs) and `weight` (outputs, inputs)."""

    def __init__(self, weight: Tensor) -> None:
        large = weight.numel() >= PACKED and weight.dtype == torch.float32
        self.packed = large and mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512"
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        else:
            self.weight = weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return x @ self.weight

    def of_unit(self, x: Tensor, least: Tensor) -> Tensor:
        """The product of `unit(x, least)`."""
        return self(unit(x, least))

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x plus the product of y."""
        return x + self(y) if self.packed else torch.addmm(x, y, self.weight)


class Int8Product(Product):
    """The same with weights of 8 bits, symmetric about zero with a scale for each output, and inputs of 8 or 7 bits."""

    def __init__(self, weight: Tensor, bits: int = 0) -> None:
        self.bits = bits or input_bits()
        scales = weight.abs().amax(1).clamp_min(TINY).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a later torch will make the quantized tensor in another way
                wide = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.weight = torch.ops.quantized.linear_prepack(wide, None)
        finally:
            torch.backends.quantized.engine = before

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product of x over its rows' largest values, and those (B, 1).

        The inputs' range is given, -1 to 1: a kernel that measures it would round a row by its neighbours.
        """
        top = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x / top, 2 / (2**self.bits - 1), 2 ** (self.bits - 1), self.weight), top

    def __call__(self, x: Tensor) -> Tensor:
        y, top = self.scaled(x)
        return y.mul_(top)

    def of_unit(self, x: Tensor, least: Tensor) -> Tensor:
        y, top = self.scaled(x)
        return y.mul_(top.div_(_norm(x, least)))

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x, *self.scaled(y))


@cache
def input_bits() -> int:
    """Bits of Int8Product's inputs, 8 or 7, found by a product: without VNNI pairs of terms are summed in 16 bits.

    Two terms of an input and a weight of 8 bits can exceed those, and the kernel then clips the sum without a word.
    """
    ones = torch.ones(1, 64)
    return 8 if Int8Product(ones, 8)(ones).isclose(torch.tensor(64.0), rtol=0.02).all() else 7
