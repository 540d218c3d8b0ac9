"""Where the time of a step goes, at quickstart's size: python tests/benchmarks/steps.py [RECIPE] [key=value ...]

Every variant runs once in each round, in turn, so that a machine whose speed wanders slows all alike; min/median/max of the
rounds are printed, and ratios of medians against the first variant.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.data.batches import Batch
from llm.distributed.pairwise_sum import PairwiseSum
from llm.distributed.sharding import Sharding, local_shard
from llm.insight.planning import sized
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer, gradient_norm
from llm.run_folder import trace

ROUNDS = 9


def main() -> None:
    recipe = load(Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/quickstart.yaml"), sys.argv[2:])
    recipe = with_steps(recipe, 1_400_000)  # tokens of a text, by which `auto` is settled
    torch.manual_seed(0)
    vocabulary = sized(recipe).tokenizer.vocab_size
    rows = recipe.windows_per_step
    tokens = torch.randint(vocabulary, (rows, recipe.model.context + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(rows))
    lean = torch.bfloat16 if recipe.machine.precision == "bf16" else torch.float32
    sharding = Sharding()

    def model_of(dropout: float) -> Transformer:
        return Transformer(replace(recipe.model, dropout=dropout), vocabulary, 1)

    plain, dropped = model_of(0.0), model_of(0.1)
    muon, adamw = (
        Optimizer(plain, replace(recipe.train, optimizer=name, learning_rate=0.0), lean) for name in ("muon", "adamw")
    )
    one, yes = torch.ones(()), torch.tensor(True)

    def passes(model: Transformer, micro_batches: int = 1, exact: bool = False) -> None:
        counter = PairwiseSum()
        model.zero_grad(set_to_none=True)
        for part in range(micro_batches):
            if exact:
                model.zero_grad(set_to_none=True)
            cut = slice(part * rows // micro_batches, (part + 1) * rows // micro_batches)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lean == torch.bfloat16):
                loss = model(batch.tokens[cut], batch.targets[cut], batch.windows[cut])
            (loss / recipe.train.tokens_per_step).backward()
            if exact:
                counter.add([local_shard(p.grad).local.clone() for p in model.parameters() if p.grad is not None])
        if exact:
            counter.total()

    passes(plain)
    gradients = [p.grad for p in plain.parameters()]

    def update(optimizer: Optimizer) -> None:
        for p, gradient in zip(plain.parameters(), gradients, strict=True):
            p.grad = gradient  # an update lets go of it
        gradient_norm([local_shard(gradient) for gradient in gradients if gradient is not None], sharding)
        optimizer.step(1, 1.0, one, yes)

    variants: dict[str, Callable[[], object]] = {
        "forward and backward": lambda: passes(plain),
        "the same, dropout 10 %": lambda: passes(dropped),
        "the same in 4 micro-batches": lambda: passes(plain, 4),
        "the same in 4, exact": lambda: passes(plain, 4, exact=True),
        "norm and Muon": lambda: update(muon),
        "norm and AdamW": lambda: update(adamw),
        "fingerprint of all weights": lambda: trace.checksum(
            {n: local_shard(p) for n, p in plain.named_parameters()}, sharding
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round in range(-2, ROUNDS):
        for name, act in variants.items():
            began = time.perf_counter()
            act()
            if round >= 0:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["forward and backward"])
    size = f"{sum(p.numel() for p in plain.parameters()) / 1e6:.1f} M parameters, {recipe.train.tokens_per_step} tokens a step"
    print(
        f"{recipe.run}: {size}, {torch.get_num_threads()} threads, {lean}, torch {torch.__version__}, {ROUNDS} rounds"
    )
    print(f"{'milliseconds':30}{'min':>8}{'median':>8}{'max':>8}{'of passes':>11}")
    for name, values in seconds.items():
        low, middle, high = (1000 * v for v in (min(values), statistics.median(values), max(values)))
        print(f"{name:30}{low:8.1f}{middle:8.1f}{high:8.1f}{middle / 10 / base:10.1f}%")
    print(
        f"tokens/s with Muon: {recipe.train.tokens_per_step / np.median(np.add(seconds['forward and backward'], seconds['norm and Muon'])):,.0f}"
    )


if __name__ == "__main__":
    main()
