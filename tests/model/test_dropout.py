"""A dropout mask is a function of (seed, position, site, element) alone, on the CPU and on an accelerator."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from llm.model.dropout import dropout, hashed_mask, keep_mask
from llm.model.transformer import Block
from llm.training.memory import clear_tracebacks
from tests import tiny

TOKENS, DIM = 31, 33  # an odd number of elements, so that a window does not end with a word of bits
POSITIONS = torch.arange(64)
Mask = Callable[..., Tensor]


def on_the_cpu(positions: Tensor, *, seed: int = 1, site: int = 3, rate: float = 0.5) -> Tensor:
    return keep_mask(positions, seed, torch.tensor(site), TOKENS, DIM, rate)


def on_an_accelerator(positions: Tensor, *, seed: int = 1, site: int = 3, rate: float = 0.5) -> Tensor:
    return hashed_mask(positions, seed, torch.tensor(site), TOKENS, DIM, rate)


@pytest.fixture(params=[on_the_cpu, on_an_accelerator])
def mask(request: pytest.FixtureRequest) -> Mask:
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of what independent masks would show."""
    both = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())
    return abs(both[0, 1].item()) * a.numel() ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_share_that_stays_is_what_was_asked_for(mask: Mask, rate: float) -> None:
    keep = mask(POSITIONS, rate=rate)
    assert keep.dtype == torch.bool
    deviation = (rate * (1 - rate) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - rate)) <= 4 * deviation + 1 / 65536
    per_window = keep.double().mean((1, 2)) - (1 - rate)
    assert per_window.abs().max().item() <= 5 * deviation * len(POSITIONS) ** 0.5 + 1 / 65536


def test_what_stays_is_scaled_to_keep_the_mean() -> None:
    dropped = dropout(torch.ones(64, TOKENS, DIM), POSITIONS, seed=1, site=0, rate=0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)  # four standard deviations


def test_a_mask_does_not_depend_on_the_micro_batch(mask: Mask) -> None:
    error_barrier = mask(POSITIONS)
    for size in (1, 4, 16):
        assert torch.equal(torch.cat([mask(part) for part in POSITIONS.split(size)]), error_barrier)
    assert torch.equal(mask(POSITIONS.flip(0)).flip(0), error_barrier)


def test_a_mask_does_not_depend_on_threads(mask: Mask, two_threads: None) -> None:
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(mask, POSITIONS.repeat(4).split(1)))
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(at_once), mask(POSITIONS.repeat(4)))


def test_a_mask_leaves_the_global_generator_alone(mask: Mask) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    mask(POSITIONS)
    assert torch.equal(torch.rand(3), expected)


def test_every_seed_position_and_site_has_a_mask_of_its_own(mask: Mask) -> None:
    """Neighbours, far ones, and pairs that a sum or an exclusive or would confuse; a site is a place in a layer."""
    seeds, positions, sites = (0, 1, 2, 3, 2**32 - 1), (0, 1, 2, 3, 2**31, 2**32, 2**32 + 1, 2**40), (0, 1, 2, 3, 4096)
    masks = [
        mask(torch.tensor([position]), seed=seed, site=site).flatten()
        for seed, position, site in itertools.product(seeds, positions, sites)
    ]
    related = torch.corrcoef(torch.stack(masks).double()).fill_diagonal_(0).abs()
    assert related.max().item() * (TOKENS * DIM) ** 0.5 < 6  # standard deviations, of 20,000 pairs


@pytest.mark.parametrize("other", [{"seed": 2}, {"site": 4}, {"site": 5}, {"seed": 3, "site": 1}])
def test_masks_of_other_seeds_and_sites_are_not_related(mask: Mask, other: dict[str, int]) -> None:
    first, second = mask(POSITIONS).flatten(1), mask(POSITIONS, **other).flatten(1)
    for apart in range(0, 300, 4):  # nor is one the other some words of bits on: masks of a counter could overlap
        assert correlation(first[:, apart:], second[:, : TOKENS * DIM - apart]) < 5
        assert correlation(second[:, apart:], first[:, : TOKENS * DIM - apart]) < 5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_of_a_mask_are_not_related(mask: Mask, rate: float) -> None:
    keep = mask(POSITIONS, rate=rate)
    flat = keep.flatten(1)
    for apart in (1, 2, 3, 4, 8, DIM, 2 * DIM, 256):
        assert correlation(flat[:, apart:], flat[:, :-apart]) < 4
    assert correlation(keep[1:], keep[:-1]) < 4


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), reason="needs a C++ compiler"
)
def test_a_mask_is_the_same_compiled() -> None:
    def there_and_back(run: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        hidden = torch.ones(64, TOKENS, DIM, requires_grad=True)
        dropped = run(hidden)
        return dropped.detach(), *torch.autograd.grad(dropped.square().sum(), hidden)

    def drop(hidden: Tensor) -> Tensor:
        return dropout(hidden * 1, POSITIONS, seed=1, site=3, rate=0.5)

    eager, compiled = there_and_back(drop), there_and_back(torch.compile(drop, fullgraph=True))
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])
    assert torch.equal(eager[0] != 0, on_the_cpu(POSITIONS))


def test_every_place_of_the_model_is_a_site_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the embedding, and after attention and MLP of each layer; all from the model's seed."""
    asked: list[tuple[int, int]] = []

    def spy(hidden: Tensor, positions: Tensor, *, seed: int, site: int, rate: float) -> Tensor:
        asked.append((seed, int(site)))
        return dropout(hidden, positions, seed=seed, site=site, rate=rate)

    monkeypatch.setattr("llm.model.transformer.dropout", spy)
    model = tiny.transformer(seed=7, layers=3, dropout=0.1)
    model(tiny.ids(2, 16), tiny.ids(2, 16), torch.arange(2))
    assert sorted(asked) == [(7, site) for site in range(1 + 2 * 3)]


def test_a_block_that_is_computed_again_drops_the_same() -> None:
    """Activation checkpointing: equal losses and gradients to the bit."""
    model = tiny.transformer(dropout=0.3)

    def there_and_back(recompute: bool) -> list[Tensor]:
        model.model.recompute = recompute
        loss = model(tiny.ids(4, 16), tiny.ids(4, 16, seed=1), torch.arange(4))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    kept, again = there_and_back(False), there_and_back(True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    without = model(tiny.ids(4, 16), tiny.ids(4, 16, seed=1))
    assert not torch.equal(kept[0], without)  # so something was dropped


def test_a_recomputed_block_that_was_cut_off_leaves_nothing_behind_although_its_error_is_kept() -> None:
    """As where memory runs short: the engine's contexts, which a frame of the error holds, are closed by `let_go`."""
    model, kept = tiny.transformer(dropout=0.3), []
    model.model.recompute = True

    def there_and_back() -> list[Tensor]:
        loss = model(tiny.ids(4, 16), tiny.ids(4, 16, seed=1), torch.arange(4))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = there_and_back()
    block = model.blocks[1]
    assert isinstance(block, Block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block.mlp.down_proj, "forward", lambda x: torch.empty(1 << 60))
        try:
            there_and_back()
        except RuntimeError as error:
            kept.append(error)
            clear_tracebacks(error)
    assert "memory" in str(kept[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, there_and_back(), strict=True))
