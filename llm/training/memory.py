"""Memory: recognise that it ran out (only here), free what an exception holds, measure the peak."""

import re
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

MESSAGES = re.compile("can't allocate memory|bad_alloc|out of memory")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and MESSAGES.search(str(error)) is not None)


def within_memory(act: Callable[[], Result]) -> Result | None:
    """The result of `act` (never None), or None if memory ran out; the memory that it held is freed."""
    try:
        return act()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        clear_tracebacks(error)
        return None


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: by tensors on a CUDA device, else by this process. None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clear_tracebacks(error: BaseException) -> None:
    """Clear the frames of an exception and of those it followed, so that the tensors they hold are freed.

    Autograd contexts entered in these frames end too: before torch 2.13 an interrupted recomputed block would
    take the next pass's activations for its own.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__
