"""Torch's modes: of gradients, types and devices, which a caller may have changed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def usual_modes() -> Iterator[None]:
    """Gradients, fp32, the CPU and no autocast by default, whatever the caller's modes, which are back afterwards."""
    dtype, cached = torch.get_default_dtype(), torch.is_autocast_cache_enabled()
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    cpu = torch.device("cpu")  # entered where it is needed only: each operation would pay for it
    with torch.inference_mode(False), torch.enable_grad(), nullcontext() if torch.get_default_device() == cpu else cpu:
        try:
            torch.set_default_dtype(torch.float32)
            for kind in kinds:
                torch.set_autocast_enabled(kind, False)
            if kinds:  # torch empties the cache at the end of the outermost autocast, long after weights have changed
                torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            for kind in kinds:
                torch.set_autocast_enabled(kind, True)
            torch.set_autocast_cache_enabled(cached)
