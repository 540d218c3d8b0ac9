"""Dropout by counter: a mask is a pure function of (seed, position of the window, site, element), without a generator.

So it is the same whatever the micro-batch, the number of processes, recomputation or compilation, and nothing of it is
saved. A position belongs to exactly one step. On a CPU the bits are numpy's Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011); on an accelerator, where they must be made in place, an integer hash.
"""

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("llm::keep_mask", mutates_args=())
def keep_mask(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    """Which elements stay: bool (windows, tokens, dim), each True with probability 1 - rate to within 1/65536.

    positions: (windows,) of int64; `site` numbers the places of the model where dropout stands.
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


@keep_mask.register_fake
def _(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    return positions.new_empty((positions.shape[0], tokens, dim), dtype=torch.bool)


def hashed_mask(positions: Tensor, seed: int, site: Tensor, tokens: int, dim: int, rate: float) -> Tensor:
    """The same by integer arithmetic alone, which a compiler joins with what stands around it.

    int32 products wrap, as they should.
    """

    def scramble(word: Tensor) -> Tensor:  # the finaliser of MurmurHash3, by Austin Appleby
        word = (word ^ ((word >> 16) & 0xFFFF)) * -2048144789
        word = (word ^ ((word >> 13) & 0x7FFFF)) * -1028477387
        return word ^ ((word >> 16) & 0xFFFF)

    def as_int32(number: int) -> int:
        return (number + (1 << 31)) % (1 << 32) - (1 << 31)

    high, low = (positions >> 32).int(), ((positions + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    place = site.int() * as_int32(0x9E3779B1)
    key = scramble(scramble(scramble(scramble(low) ^ as_int32(seed)) + high) + place)[:, None]
    # Not a multiple of it: a compiler would join the factors, beyond what 32 bits hold.
    counter = torch.arange(tokens * dim, dtype=torch.int32, device=positions.device)
    word = scramble(scramble(counter[None] ^ key) + key)
    return ((word & 0xFFFF) >= round(rate * 65536)).view(-1, tokens, dim)


def dropout(hidden: Tensor, positions: Tensor, *, seed: int, site: int | Tensor, rate: float) -> Tensor:
    """In `hidden` (windows, tokens, dim) itself: a share `rate` set to zero, the rest scaled up to keep the mean.

    Where the code is compiled `site` is a tensor, so that it is the same code for all sites.
    """
    if not isinstance(site, Tensor):
        site = positions.new_full((), site)
    mask = keep_mask if positions.device.type == "cpu" else hashed_mask
    keep = mask(positions, seed, site, hidden.shape[1], hidden.shape[2], rate)
    return hidden.mul_(keep.to(hidden.dtype).mul_(1 / (1 - rate)))
