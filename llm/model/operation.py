"""Functions as single operations of torch, which a compiler calls and does not look into."""

from collections.abc import Callable
from typing import Any

import torch


def operation(function: Callable[..., Any]) -> Any:
    """`torch.ops.llm.NAME`, which runs `function` on a CPU. Its annotations are the schema; it changes no argument.

    Like `torch.library.custom_op`, but that imports the compiler when it first runs: over a second in every process.
    """
    name = f"llm::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "cpu", function)
    return getattr(torch.ops.llm, function.__name__)
