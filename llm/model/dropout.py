"""Counter-based dropout: a mask is a pure function of (seed, window position, site, element), without a generator.

Masks therefore do not depend on the micro-batch, the number of processes, recomputation or compilation, and need no
saved state. Each position belongs to exactly one step. CPU bits come from numpy's Philox (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011); accelerators compute an integer hash in place.
"""

import numpy as np
import torch
from torch import Tensor

from llm.model.operation import operation


@operation
def keep_mask(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    """Elements to keep: bool (windows, tokens, dim), each True with probability 1 - rate to within 1/65536.

    positions: (windows,) of int64; `site` is the index of the dropout layer in the model.
    """
    words = -(-tokens * dim // 4)
    keep = np.empty((len(positions), words * 4), dtype=bool)
    threshold = np.uint16(min(65535, round(rate * 65536)))
    for row, position in zip(keep, positions.tolist(), strict=True):
        bits = np.random.Philox(
            key=np.array([seed, position], np.uint64), counter=np.array([0, 0, int(site), 0], np.uint64)
        ).random_raw(words)
        np.greater_equal(bits.view(np.uint16), threshold, out=row)
    return torch.from_numpy(keep)[:, : tokens * dim].contiguous().view(-1, tokens, dim)


@torch.library.register_fake("llm::keep_mask")
def _(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    return positions.new_empty((positions.shape[0], tokens, dim), dtype=torch.bool)


def hashed_mask(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    """The same mask layout from integer arithmetic, which a compiler can fuse; int32 products wrap as intended."""

    def scramble(word: Tensor) -> Tensor:  # the finaliser of MurmurHash3, by Austin Appleby
        word = (word ^ ((word >> 16) & 0xFFFF)) * -2048144789
        word = (word ^ ((word >> 13) & 0x7FFFF)) * -1028477387
        return word ^ ((word >> 16) & 0xFFFF)

    def as_int32(number: int) -> int:
        return (number + (1 << 31)) % (1 << 32) - (1 << 31)

    high, low = (positions >> 32).int(), ((positions + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    place = site.int() * as_int32(0x9E3779B1)
    key = scramble(scramble(scramble(scramble(low) ^ as_int32(seed)) + high) + place)[:, None]
    # The counter is not multiplied first: a compiler would merge the two factors into one that overflows 32 bits.
    counter = torch.arange(tokens * dim, dtype=torch.int32, device=positions.device)
    word = scramble(scramble(counter[None] ^ key) + key)
    return ((word & 0xFFFF) >= round(rate * 65536)).view(-1, tokens, dim)


def dropout(hidden: Tensor, positions: Tensor, *, seed: int, site: int | Tensor, rate: float) -> Tensor:
    """Dropout in place: set a fraction `rate` of `hidden` (windows, tokens, dim) to zero and scale up the others.

    Compiled code passes `site` as a tensor, so that all sites share one compilation.
    """
    if not isinstance(site, Tensor):
        site = positions.new_full((), site)
    mask = keep_mask if positions.device.type == "cpu" else hashed_mask
    keep = mask(positions, seed, site, hidden.shape[1], hidden.shape[2], rate)
    return hidden.mul_(keep.to(hidden.dtype).mul_(1 / (1 - rate)))
