"""Another project's own model, optimizer and schedule, from a clone of its source, on the windows that a recipe of ours reads.

    git clone https://github.com/karpathy/nanochat && git clone https://github.com/karpathy/nanoGPT
    python tests/benchmarks/peers.py nanochat nanochat recipes/quickstart.yaml --rate 0.8 \\
        tokenizer.vocabulary=4096 train.tokens=0.5M train.tokens_per_step=1024
    python tests/benchmarks/trainers.py --nanogpt nanoGPT --nanochat nanochat       # tokens a second beside ours

It has the recipe's width, layers, heads, context, pieces, seed, steps and windows, and is measured on the same held-out text, in
which its attention crosses documents, as it has no other. Its learning rates are its own times --rate, and everything else is its
own as well, but for nanochat's weight decay, which is 0 unless --decay says otherwise: nanochat's rate falls over the last 65 %,
nanoGPT's in a cosine. It prints its parameters, tokens a second and bits per byte.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

MOST = 2048  # tokens of a micro-batch, so that its logits stay small

Loss = Callable[[Any, Any], Any]  # of tokens and targets, -1 where there is none: their mean in nats
Update = Callable[[int], None]  # sets the rates of a step and takes it


def heads(shape: Any) -> int:
    """Theirs must divide the width: classic's 7 become 6."""
    return next(n for n in range(shape.heads, 0, -1) if shape.dim % n == 0)


def nanochat(recipe: Any, vocabulary: int, rate: float, decay: float, precision: str) -> tuple[Any, Loss, Update]:
    """Its GPT and MuonAdamW, all of a context in every layer, with the schedules of its scripts/base_train.py."""
    os.environ["NANOCHAT_DTYPE"] = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    import torch
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    shape, steps = recipe.model, recipe.train.steps
    kv_heads = shape.kv_heads if heads(shape) == shape.heads else heads(shape)
    sizes = {"n_layer": shape.layers, "n_head": heads(shape), "n_kv_head": kv_heads, "n_embd": shape.dim}
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=shape.context, vocab_size=vocabulary, window_pattern="L", **sizes))
    model.to_empty(device="cpu")
    model.init_weights()
    rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "matrix_lr": 0.02, "scalar_lr": 0.5}
    optimizer = model.setup_optimizer(**{name: value * rate for name, value in rates.items()}, weight_decay=decay)
    falling = round(0.65 * steps)

    def update(step: int) -> None:
        left = min(1.0, (steps - step) / falling)
        factor = min(1.0, (step + 1) / 40, left + (1 - left) * 0.05)
        momentum = min(0.85 + step / 400 * 0.12, 0.97) if left == 1 else 0.90 + 0.07 * left
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return model, torch.compile(model, dynamic=False), update


def nanogpt(recipe: Any, vocabulary: int, rate: float, decay: float, precision: str) -> tuple[Any, Loss, Update]:
    """Its GPT without biases and its AdamW, compiled, clipped at 1, with a cosine to a tenth of the rate."""
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape, steps = recipe.model, recipe.train.steps
    sizes = {"n_layer": shape.layers, "n_head": heads(shape), "n_embd": shape.dim}
    model = GPT(GPTConfig(block_size=shape.context, vocab_size=vocabulary, bias=False, dropout=0.0, **sizes))
    optimizer = model.configure_optimizers(decay, 6e-4 * rate, (0.9, 0.95), "cpu")
    compiled = torch.compile(model)

    def update(step: int) -> None:
        factor = min((step + 1) / 40, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * rate * factor
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss(tokens: Any, targets: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            return compiled(tokens, targets)[1]

    return model, loss, update


PEERS = {"nanochat": (nanochat, 0.0), "nanogpt": (nanogpt, 0.1)}  # with the weight decay


def train(
    peer: str, recipe_path: str, overrides: list[str], rate: float, decay: float | None, measure: bool
) -> dict[str, Any]:
    import torch

    from llm.base.constants import IGNORED
    from llm.config.reading import load
    from llm.data.batches import BatchLoader, eval_batches
    from llm.data.pipeline import prepare_text
    from llm.data.shuffle import WindowShuffle

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe = load(Path(recipe_path), overrides)
    prepared = prepare_text(recipe, lambda line: print(line, file=sys.stderr))
    side, held_out, context = prepared.shards.train, prepared.shards.validation, recipe.model.context
    steps = recipe.train.steps or recipe.train.tokens // recipe.train.tokens_per_step
    recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    torch.manual_seed(recipe.seed)
    build, own_decay = PEERS[peer]
    precision = recipe.machine.precision if recipe.machine.precision != "auto" else "bf16"
    model, loss_of, update = build(
        recipe, prepared.tokenizer.vocab_size, rate, own_decay if decay is None else decay, precision
    )
    windows = recipe.windows_per_step
    micro_batch = max(n for n in range(1, windows + 1) if windows % n == 0 and n * context <= MOST)
    loader = BatchLoader(side, WindowShuffle(recipe.seed, side.tokens, context), windows, micro_batch)
    times, losses = [], []
    for step in range(steps):
        began = time.perf_counter()
        for batch in loader.at(step):
            loss = loss_of(batch.tokens.contiguous(), batch.targets.contiguous()) * (micro_batch / windows)
            loss.backward()
            losses.append(loss.item() * windows / micro_batch)
        update(step)
        times.append(time.perf_counter() - began)
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {statistics.mean(losses[-100:]):.4f}", file=sys.stderr, flush=True)
    found = {"tokens_per_second": recipe.train.tokens_per_step / statistics.median(times[3:])}
    found |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro_batch": micro_batch,
        "train_loss": losses[-1],
    }
    if measure:
        nats = 0.0
        with torch.no_grad():
            for batch in eval_batches(held_out, context, micro_batch):
                targets = batch.targets.masked_fill(batch.targets == IGNORED, -1)
                if count := int((targets >= 0).sum()):
                    nats += float(loss_of(batch.tokens.contiguous(), targets.contiguous())) * count
        found["bits_per_byte"] = nats / held_out.text_bytes / math.log(2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("source", type=Path, help="a clone of the peer's repository")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of all the peer's learning rates")
    parser.add_argument("--decay", type=float, help="its weight decay, instead of its own")
    parser.add_argument("--speed", action="store_true", help="do not measure the held-out text")
    given = parser.parse_intermixed_args()
    sys.path.insert(0, str(given.source.resolve()))
    print(json.dumps(train(given.peer, given.recipe, given.overrides, given.rate, given.decay, not given.speed)))


if __name__ == "__main__":
    main()
