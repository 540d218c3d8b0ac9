"""Kernels of a step and the bytes that they move, from the compiler's graph: python tests/benchmarks/kernels.py [small medium]

An estimate, for machines without a GPU: the step is lowered for a CPU on tensors without contents, and Triton may fuse a little
more or less. A product's time is its arithmetic at the card's rate, every other kernel's the bytes that it reads and writes at
the card's bandwidth, and no kernel takes less than LAUNCH. Micro-batches are those of the table in README.md, in bf16.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.base import constants
from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.model import cost, loss
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer

WINDOWS = {"small": 32, "medium": 16}
BANDWIDTH, RATE, LAUNCH = 912e9, 68e12, 3e-6  # of a 3080 Ti: bytes and bf16 operations a second; seconds
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "attention")
FREE = ("empty", "detach", "view", "reshape", "expand", "slice", "select", "split", "unbind", "transpose", "alias", "as_strided",
        "t.default", "squeeze", "permute", "new_empty", "lift_fresh", "_local_scalar", "prim.")  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts every operation that runs, but those of compiled graphs, which add themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others: Counter[int] = Counter()  # bytes of a kernel: how many such
        self.paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing is compiled while this mode is on

    def add(self, name: str, size: int) -> None:
        if any(word in name for word in PRODUCTS):
            self.products += 1
        else:
            self.others[size] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if not self.paused and not any(word in name for word in FREE):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
            self.add(name, sum(x.numel() * x.element_size() for x in tensors.values()))
        return result

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused, before = True, self.paused
        yield
        self.paused = before

    def backend(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """A backend for torch.compile that lowers and fuses, and then runs the graph as it was."""

        def lowered(part: torch.fx.GraphModule, examples: Any, **options: Any) -> Callable[..., Any]:
            record_original_output_strides(part)
            lowering = GraphLowering(part, example_inputs=examples, is_backward=options.get("is_backward", False))
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()), self.pause():
                lowering.run(*examples)
                lowering._update_scheduler()
                found = [(_name(node), node.get_read_write_buffers_sizes()) for node in lowering.scheduler.nodes]
            run = make_boxed_func(part.forward)

            def counted(arguments: list[Any]) -> Any:
                for name, size in found:
                    if size:
                        self.add(name, size)
                with self.pause():
                    return run(arguments)

            counted._boxed_call = True  # type: ignore[attr-defined]
            return counted

        return compile_fx(graph, inputs, inner_compile=lowered)

    def summary(self, flops: float) -> tuple[int, int, float, float]:
        """Products, other kernels, their bytes, seconds of a step on the card."""
        moved = sum(size * count for size, count in self.others.items())
        waits = sum(max(size / BANDWIDTH, LAUNCH) * count for size, count in self.others.items())
        return self.products, self.others.total(), moved, flops / RATE + waits


def _name(node: Any) -> str:
    return str(getattr(node.node, "python_kernel_name", None) or node.get_name())


def count(name: str, variant: str) -> tuple[int, int, float, float]:
    recipe = with_steps(load(Path(f"recipes/{name}.yaml")), 10**9)
    shape, vocabulary, rows = recipe.model, recipe.tokenizer.vocabulary, WINDOWS[name]
    torch._dynamo.reset()
    constants.CHUNK_NUMBERS["cpu"] = constants.CHUNK_NUMBERS["cuda"]
    constants.STACKED_NUMBERS["cpu"] = constants.STACKED_NUMBERS["cuda"]
    kernels = Kernels()
    FakeTensorMode.ignore_compile_internals = Kernels.ignore_compile_internals  # type: ignore[method-assign]
    with FakeTensorMode():
        Transformer.initialise = lambda self, seed: None  # type: ignore[method-assign]
        model = Transformer(shape, vocabulary)
        optimizer = Optimizer(model, recipe.train, torch.bfloat16)
        tokens = torch.zeros(rows, shape.context, dtype=torch.int64)
        run: Callable[..., Any] = model
        learn = loss.loss_and_grad
        if variant == "blocks":
            for block in model.blocks:
                block.compile(backend=kernels.backend)
            learn = torch.compile(loss.loss_and_grad_fused, backend=kernels.backend)
        elif variant == "whole":
            run, learn = torch.compile(model, backend=kernels.backend), loss.loss_and_grad_fused
        loss._HeadAndLoss.learn = staticmethod(learn)
        with kernels:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                nats = run(tokens, tokens, tokens[:, 0].contiguous())
            (nats / recipe.train.tokens_per_step).backward()
            optimizer.step(1, 1.0, torch.ones(()), torch.ones((), dtype=torch.bool))
    return kernels.summary(cost.flops_per_token(shape, vocabulary) * rows * shape.context)


def main() -> None:
    print(f"{'one micro-batch and its update':34}{'products':>10}{'others':>8}{'their GB':>10}{'ms':>8}{'of peak':>9}")
    for name in sys.argv[1:] or list(WINDOWS):
        for variant in ("eager", "blocks", "whole"):
            products, others, moved, seconds = count(name, variant)
            recipe = load(Path(f"recipes/{name}.yaml"))
            flops = (
                cost.flops_per_token(recipe.model, recipe.tokenizer.vocabulary) * WINDOWS[name] * recipe.model.context
            )
            share = flops / RATE / seconds
            print(
                f"{f'{name}, {variant}':34}{products:10}{others:8}{moved / 1e9:10.2f}{1000 * seconds:8.1f}{share:9.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
