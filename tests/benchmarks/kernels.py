"""Kernels of a GPU's training step, and the bytes that they move, without a GPU: an estimate.

    python tests/benchmarks/kernels.py [small medium] [--windows 8]

"Plain" counts torch's operations as a step would call them, on tensors without data. "Compiled" takes the blocks and the loss from
torch's compiler instead, lowered for a CPU, whose kernels are those of its graph after fusion; products and attention stay as they are.
Seconds are of a card of 912 GB/s and 68 TFLOP/s (RTX 3080 Ti): a product takes the longer of its bytes and its arithmetic, all else its
bytes; launches cost nothing. A norm counts as its parts in the plain step, as on a CPU; a GPU has one kernel for it.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.config.schema import Recipe
from llm.insight.planning import sized
from llm.model import loss, transformer
from llm.model.transformer import Transformer
from llm.optim import optimizer

BANDWIDTH, FLOPS = 912e9, 68e12
ROWS = 256  # of logits
NO_KERNEL = (torch.ops.aten.empty_like, torch.ops.aten.detach, torch.ops.aten._unsafe_view, torch.ops.aten.empty)


@dataclass
class Work:
    """`products` and attention with their `product_seconds` on the card; `others` and the bytes that these move."""

    products: int = 0
    others: int = 0
    product_bytes: float = 0
    other_bytes: float = 0
    product_seconds: float = 0

    def plus(self, other: "Work", times: int = 1) -> "Work":
        return Work(**{name: value + times * vars(other)[name] for name, value in vars(self).items()})

    def line(self) -> str:
        seconds = self.product_seconds + self.other_bytes / BANDWIDTH
        moved = (self.product_bytes + self.other_bytes) / 1e9
        return f"{self.products:,} products, {self.others:,} other kernels, {moved:,.1f} GB, {1000 * seconds:,.0f} ms"


class Counter(TorchDispatchMode):
    """Counts what runs under it. A view moves nothing; every other operation reads its tensors and writes its results."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten" or func.overloadpacket in NO_KERNEL:
            return out
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        moved = sum(each.numel() * each.element_size() for each in tensors)
        if counts := flop_registry.get(func.overloadpacket):
            self.work.products += 1
            self.work.product_bytes += moved
            self.work.product_seconds += max(counts(*args, **(kwargs or {}), out_val=out) / FLOPS, moved / BANDWIDTH)
        elif tensors:
            self.work.others += 1
            self.work.other_bytes += moved
        return out


def counted(act: Callable[[], object]) -> Work:
    with Counter() as counter:
        act()
    return counter.work


def compiled(act: Callable[[int], object], size: int, plain: Work) -> Work:
    """`act` of `size` after the compiler: its other kernels, and their bytes extrapolated from sizes 1 and 2."""
    found = []
    for small in (1, 2):
        torch._dynamo.reset()
        metrics.reset()
        act(small)
        found.append((metrics.generated_kernel_count, metrics.num_bytes_accessed))
    (kernels, one), (_, two) = found
    others = one + (two - one) * (size - 1) - plain.product_bytes
    return Work(plain.products, kernels, plain.product_bytes, others, plain.product_seconds)


def as_on_gpu() -> None:
    """The modules instead of a CPU's fused passes, and a GPU's chunks and stacks."""
    transformer.Attention = transformer.MLP = type(None)  # type: ignore[assignment, misc]
    loss.CHUNK_NUMBERS = {"cpu": loss.CHUNK_NUMBERS["cuda"]}
    loss.CACHED_NUMBERS = 1 << 62
    optimizer.STACKED_NUMBERS = {"cpu": optimizer.STACKED_NUMBERS["cuda"]}


def of_block(model: Transformer, windows: int) -> None:
    """Forward and backward of one block."""
    shape = model.shape
    x = torch.zeros(windows, shape.context, shape.dim, requires_grad=True)
    cos = torch.zeros(1, 1, shape.context, shape.head_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.model.layers[0](x, cos, cos, None)
    y.backward(torch.zeros_like(y))


def of_softmax(model: Transformer, rows: int) -> None:
    """Loss and gradient of a chunk's logits; `rows` in units of ROWS."""
    logits = torch.zeros(rows * ROWS, model.lm_head.weight.shape[0], dtype=torch.bfloat16)
    loss._HeadAndLoss.learn(logits, torch.zeros(len(logits), dtype=torch.int64))


def measure(recipe: Recipe, fake: FakeTensorMode, model: Transformer, real: Transformer, windows: int) -> None:
    """Print the step of `model`, which has no data, and that of `real` after the compiler."""
    shape, micro_batches = recipe.model, recipe.windows_per_step // windows
    tokens = windows * shape.context
    chunks = -(-tokens // (loss.CHUNK_NUMBERS["cpu"] // sized(recipe).tokenizer.vocab_size))
    parts = {"block": (of_block, shape.layers, windows), "softmax": (of_softmax, chunks, tokens // chunks // ROWS)}
    with fake:
        plain = {part: counted(partial(act, model, size)) for part, (act, _, size) in parts.items()}
        whole = counted(partial(passes, model, windows))
        update = optimizer.Optimizer(model, recipe.train, torch.bfloat16)
        one = torch.ones(())
        updating = counted(lambda: update.step(0, 1.0, one, one > 0))
    real.model.layers[0].compile(dynamic=False)
    loss.compile_loss()
    after = {part: compiled(partial(act, real), size, plain[part]) for part, (act, _, size) in parts.items()}
    loss.compile_loss(False)
    passes_after = whole
    for part, (_, times, _) in parts.items():
        passes_after = passes_after.plus(plain[part], -times).plus(after[part], times)
    print(f"{recipe.run}: {recipe.windows_per_step} windows a step in {micro_batches} micro-batches")
    print(f"  plain:    {updating.plus(whole, micro_batches).line()}")
    print(f"  compiled: {updating.plus(passes_after, micro_batches).line()}")
    for part, (_, times, _) in parts.items():
        print(f"    {part}, {times} in a micro-batch, plain: {plain[part].line()}; compiled: {after[part].line()}")
    print(f"    the update, never compiled: {updating.line()}", flush=True)


def passes(model: Transformer, windows: int) -> None:
    """Forward and backward of the whole model."""
    tokens = torch.zeros(windows, model.shape.context, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = model(tokens, tokens)
    total.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["small", "medium"])
    parser.add_argument("--windows", type=int, default=8, help="of a micro-batch")
    given = parser.parse_args()
    recipes = [with_steps(load(Path(__file__).parents[2] / f"recipes/{name}.yaml"), 10**9) for name in given.recipes]
    inductor.fx_graph_cache = False  # a graph from the cache comes without its bytes
    inductor_metrics_log.setLevel(logging.INFO)  # else they are not counted
    inductor_metrics_log.propagate = False
    fake = FakeTensorMode()
    with fake:
        models = [Transformer(recipe.model, sized(recipe).tokenizer.vocab_size) for recipe in recipes]
    reals = [Transformer(recipe.model, sized(recipe).tokenizer.vocab_size) for recipe in recipes]
    as_on_gpu()
    for recipe, model, real in zip(recipes, models, reals, strict=True):
        measure(recipe, fake, model, real, given.windows)


if __name__ == "__main__":
    main()
