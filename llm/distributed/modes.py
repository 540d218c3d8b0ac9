"""Torch's modes: of gradients, types, devices, precision and attention, which a caller may have changed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [kernel for name, kernel in SDPBackend.__members__.items() if name != "ERROR"]


@contextmanager
def usual_modes() -> Iterator[None]:
    """Gradients, fp32, the CPU, any kernel and no autocast, whatever the caller's modes, which are back afterwards."""
    dtype, cached = torch.get_default_dtype(), torch.is_autocast_cache_enabled()
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    torch.autocast_increment_nesting()
    is_nested = torch.autocast_decrement_nesting() > 0  # also in one that is switched off, or of a device not here
    products = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    precisions = [each.fp32_precision for each in products]  # else bf16 or TF32 for torch.set_float32_matmul_precision
    cpu = torch.device("cpu")  # entered where it is needed only: each operation would pay for it
    device = nullcontext() if torch.get_default_device() == cpu else cpu
    with torch.inference_mode(False), torch.enable_grad(), device, sdpa_kernel(KERNELS):
        try:
            torch.set_default_dtype(torch.float32)
            for each in products:
                each.fp32_precision = "ieee"
            for kind in kinds:
                torch.set_autocast_enabled(kind, False)
            if is_nested:  # torch empties the cache at the end of the outermost autocast, after weights have changed
                torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            for each, precision in zip(products, precisions, strict=True):
                each.fp32_precision = "none"  # as that for all of torch
                if each.fp32_precision != precision:
                    each.fp32_precision = precision
            for kind in kinds:
                torch.set_autocast_enabled(kind, True)
            torch.set_autocast_cache_enabled(cached)
