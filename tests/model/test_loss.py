"""The loss in chunks is F.cross_entropy over the whole, in value and both gradients, and never holds the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.base.constants import IGNORED
from llm.model import loss
from llm.model.loss import Sampled, cross_entropy_sum

ROWS, DIM, VOCABULARY = 37, 8, 50
SCALE = 0.37  # of the gradient that comes from above


def world(dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in `dtype`, an fp32 head and targets, a fifth of which does not count."""
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(ROWS, DIM, generator=generator) * spread).to(dtype)
    weight = torch.randn(VOCABULARY, DIM, generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    targets[::5] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss, and gradients of hidden states and head."""
    total = cross_entropy_sum(hidden, weight, targets)
    return [total.detach(), *torch.autograd.grad(total * SCALE, [hidden, weight])]


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The same by torch, in fp64, out of the numbers that ours is given: the head in the type of the hidden states."""
    wide = [hidden.detach().double().requires_grad_(), weight.detach().to(hidden.dtype).double().requires_grad_()]
    total = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=IGNORED, reduction="sum")
    return [total.detach(), *torch.autograd.grad(total * SCALE, wide)]


def off(found: Tensor, true: Tensor) -> float:
    """Size of the error, relative to the size of the truth."""
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("spread", [1.0, 300.0])  # at 300, exp of a logit would be infinite
@pytest.mark.parametrize("rows", [1, 2, ROWS - 1, ROWS, ROWS + 1, 1000])
def test_it_is_cross_entropy_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, spread: float) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMBERS, "cpu", rows * VOCABULARY)
    for found, true in zip(ours(*world(spread=spread)), exact(*world(spread=spread)), strict=True):
        assert found.dtype == torch.float32
        assert off(found, true) < 1e-6  # fp32 rounds by 6e-8; a sum of some dozens adds a few of these


def sampled() -> Sampled:
    return Sampled(torch.tensor([3, 0, 41, 17, 8, 29]), torch.tensor([0.0, 0.0, 0.0, 2.5, 2.5, 2.5]))


def exact_sampled(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """By torch, in fp64, over the whole vocabulary: pieces that are not covered have no weight, targets always 1."""
    wide = [hidden.detach().double().requires_grad_(), weight.detach().to(hidden.dtype).double().requires_grad_()]
    log_weights = torch.full((len(targets), VOCABULARY), float("-inf"), dtype=torch.float64)
    log_weights[:, sampled().pieces] = sampled().log_weights.double()
    log_weights.scatter_(1, targets.clamp(min=0)[:, None], 0.0)
    total = F.cross_entropy(wide[0] @ wide[1].T + log_weights, targets, ignore_index=IGNORED, reduction="sum")
    return [total.detach(), *torch.autograd.grad(total * SCALE, wide)]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("rows", [1, ROWS - 1, 1000])
def test_a_sampled_softmax_covers_its_pieces_and_each_target(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, most: float
) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMBERS, "cpu", rows * VOCABULARY)
    hidden, weight, targets = world(dtype)
    total = cross_entropy_sum(hidden, weight, targets, sampled())
    found = [total.detach(), *torch.autograd.grad(total * SCALE, [hidden, weight])]
    for each, true in zip(found, exact_sampled(*world(dtype)), strict=True):
        assert off(each, true) < most


def test_a_sampled_softmax_of_all_pieces_is_the_softmax() -> None:
    hidden, weight, targets = world()
    everything = Sampled(torch.randperm(VOCABULARY), torch.zeros(VOCABULARY))
    total = cross_entropy_sum(hidden, weight, targets, everything)
    found = [total.detach(), *torch.autograd.grad(total * SCALE, [hidden, weight])]
    for each, true in zip(found, exact(*world()), strict=True):
        assert off(each, true) < 1e-6


@pytest.mark.parametrize("rows", [1, ROWS - 1, 1000])
@pytest.mark.parametrize("covered", [None, sampled()])
def test_teachers_probabilities_share_the_target(
    monkeypatch: pytest.MonkeyPatch, rows: int, covered: Sampled | None
) -> None:
    """The gradient is that of a loss against 0.7 of the target and 0.3 of two teachers' mean; the value is not."""
    monkeypatch.setitem(loss.CHUNK_NUMBERS, "cpu", rows * VOCABULARY)
    hidden, weight, targets = world()
    others = [torch.randn(VOCABULARY, size, generator=torch.Generator().manual_seed(size)) for size in (3, 5)]
    teachers = loss.Teachers([torch.randn(len(targets), each.shape[1]) for each in others], others, 0.3)
    total = cross_entropy_sum(hidden, weight, targets, covered, teachers)
    found = torch.autograd.grad(total * SCALE, [hidden, weight])
    assert torch.equal(total, cross_entropy_sum(hidden, weight, targets, covered))
    offset = torch.zeros(len(targets), VOCABULARY, dtype=torch.float64)
    if covered is not None:
        offset = torch.full_like(offset, float("-inf"))
        offset[:, covered.pieces] = covered.log_weights.double()
        offset.scatter_(1, targets.clamp(min=0)[:, None], 0.0)
    said = [
        (states.double() @ each.double().T + offset).softmax(-1)
        for states, each in zip(teachers.states, teachers.heads, strict=True)
    ]
    wanted = 0.7 * F.one_hot(targets.clamp(min=0), VOCABULARY) + 0.3 * torch.stack(said).mean(0)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logs = (wide[0] @ wide[1].T + offset).log_softmax(-1).where(wanted > 0, 0.0)
    true = -(logs * wanted)[targets != IGNORED].sum()
    for each, exactly in zip(found, torch.autograd.grad(true * SCALE, wide), strict=True):
        assert off(each, exactly) < 2e-6


def test_a_chunk_holds_at_least_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMBERS, "cpu", VOCABULARY - 1)
    assert off(ours(*world())[0], exact(*world())[0]) < 1e-6


@pytest.mark.parametrize("rows", [1, ROWS - 1, 1000])
def test_bf16_costs_the_rounding_of_its_logits_and_no_more(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMBERS, "cpu", rows * VOCABULARY)
    total, hidden_gradient, weight_gradient = ours(*world(torch.bfloat16))
    true = exact(*world(torch.bfloat16))
    assert (total.dtype, hidden_gradient.dtype, weight_gradient.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert off(total, true[0]) < 2**-9  # bf16 rounds by at most 2^-9, some logits up and others down
    assert off(hidden_gradient, true[1]) < 2**-7  # logits, slopes and their product are rounded
    assert off(weight_gradient, true[2]) < 2**-7


def test_the_softmax_is_taken_in_fp32() -> None:
    """Over 8,192 equal logits: a softmax that sums in bf16 says 9.69 where log(8192) = 9.01 is true."""
    hidden, weight = torch.zeros(1, DIM, dtype=torch.bfloat16), torch.ones(8192, DIM)
    assert cross_entropy_sum(hidden, weight, torch.tensor([5])).item() == pytest.approx(9.010913, rel=1e-6)


def test_ignored_targets_count_nothing() -> None:
    hidden, weight, targets = world()
    ignored = targets == IGNORED
    total, hidden_gradient, weight_gradient = ours(hidden, weight, targets)
    assert not hidden_gradient[ignored].any()
    kept = ours(hidden[~ignored].detach().requires_grad_(), weight, targets[~ignored])
    assert torch.allclose(total, kept[0], rtol=1e-6)  # summed in another order
    assert torch.equal(hidden_gradient[~ignored], kept[1])
    assert torch.allclose(weight_gradient, kept[2], rtol=1e-6, atol=1e-6)


def test_where_no_target_counts_loss_and_gradients_are_zero() -> None:
    hidden, weight, targets = world()
    assert not any(part.any() for part in ours(hidden, weight, torch.full_like(targets, IGNORED)))


def test_without_gradients_the_value_is_the_same_and_none_is_made() -> None:
    hidden, weight, targets = world()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        alone = cross_entropy_sum(hidden, weight, targets)
    assert torch.equal(alone, ours(hidden, weight, targets)[0])
    assert alone.grad_fn is None
    assert counter.get_total_flops() == 2 * ROWS * DIM * VOCABULARY  # the logits, and nothing else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_it_changes_nothing(dtype: torch.dtype) -> None:
    outside = ours(*world(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(*world(dtype))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outside, inside, strict=True))


# The high-water mark is the kernel's own; getrusage's would begin at the size of the process that starts this one.
MEASURE = """
import re, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from llm.model.loss import Sampled, cross_entropy_sum

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
hidden, weight = torch.randn(8192, 64, requires_grad=True), torch.randn(8192, 64, requires_grad=True)
targets = torch.randint(8192, (8192,))
loss = {"ours": cross_entropy_sum, "torch": lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum")}[sys.argv[1]]
loss(hidden[:8], weight[:8], targets[:8] % 8).backward()
hidden.grad = weight.grad = None
before = kilobytes("VmRSS")
loss(hidden, weight, targets).backward()
print((kilobytes("VmHWM") - before) / 1000)
"""


def megabytes_over_the_inputs(which: str) -> float:
    """At 8,192 tokens by a vocabulary of 8,192, there and back."""
    command = [sys.executable, "-c", MEASURE, which]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc how much memory a process had at most")
def test_the_logits_are_never_held_at_once() -> None:
    assert megabytes_over_the_inputs("torch") > 300  # so the measure sees what it should: logits and their softmax
    assert megabytes_over_the_inputs("ours") < 150


@pytest.mark.parametrize(("size", "scale"), [(100.0, 0.01), (300.0, 60.0)], ids=["gradient", "logits"])
def test_the_heads_products_of_fp16_may_pass_what_fp16_holds(size: float, scale: float) -> None:
    """The loss is scaled only after them. 2,000 rows of 100 that all miss sum up to 200,000, as do 8 of 300 times 60."""
    hidden = torch.full((2000, 8), size)
    weight = scale * torch.linspace(0.5, 1.0, 32).repeat_interleave(8).view(32, 8)
    targets = torch.full((2000,), 3)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.float16):
        head = weight.half().float().requires_grad_()
        loss = cross_entropy_sum(hidden.to(dtype).requires_grad_(), head, targets)
        (loss / 2000).backward()
        losses.append(loss.item()), gradients.append(head.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    # 2^-11 is what fp16 rounds each number of the slope by.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * size)
