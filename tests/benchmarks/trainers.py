"""Tokens a second against Hugging Face's Trainer at equal shape, data, device and precision.

    python tests/benchmarks/trainers.py [--shapes quickstart classic small] [--precision bf16]
    python tests/benchmarks/trainers.py --gigabytes 12 --precision bf16 --shapes small medium large     # on a GPU, held to so much of it
    python tests/benchmarks/trainers.py --nanogpt CLONE --nanochat CLONE     # their own models and optimizers too: peers.py

Both train Qwen3's architecture with fused AdamW from the same windows of the packaged text, without dropout, evaluation or
checkpoints, across documents; each in processes of its own, in turn. A step's time is the median of its run without the first
three. On a GPU both take the largest micro-batch that fits, ours as `auto` finds it, theirs by halving until it runs. The ceiling
is a step of nothing but its matrix products, into memory that is there: of all weights and of half of attention's square, forward
and backward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHAPES = {
    "quickstart": (30, ["train.tokens_per_step=2048"]),
    "classic": (9, ["train.tokens_per_step=4096", "model.dropout=0"]),
    "small": (7, ["train.tokens_per_step=4096"]),
}
GPU_SHAPES = {
    "quickstart": (60, []),
    "small": (25, []),
    "medium": (12, ["train.tokens_per_step=65536"]),
    "large": (8, ["train.tokens_per_step=65536"]),
}
PLAIN = ["text.files=[wiki-leads]", "evaluate.every=100k", "checkpoint.every=100k", "evaluate.prompts=[]", "tracking.every=1",
         "train.optimizer=adamw", "train.learning_rate=1e-3", "train.weight_decay=0.1", "model.dropout=0", "train.warmup=0", "train.decay=0", "train.document_mask=false",
         "train.sampled_softmax=0", "train.shallow=0"]  # fmt: skip
WHO = {
    "ours": ["machine.compile=false"],
    "ours, compiled": ["machine.compile=true"],
    "theirs": [],
    "ceiling": [],
    "ours, Muon": ["machine.compile=true", "train.optimizer=muon", "train.learning_rate=0.02"],
}
PEERS = ("nanogpt", "nanochat")
# Runs a script held to so many gigabytes of the card (0: a CPU) and says how much of it was taken.
HELD = """
import runpy, sys, torch
gigabytes = float(sys.argv.pop(1))
if gigabytes:
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / torch.cuda.mem_get_info()[1]))
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    if gigabytes:
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} {torch.cuda.max_memory_reserved() / 2**30:.2f}")
"""


def result(tokens_per_second: float, **others: Any) -> None:
    print(json.dumps({"tokens_per_second": tokens_per_second, **others}))


def ours(recipe: str, gigabytes: float, overrides: list[str]) -> None:
    """Run the launch script; print the median tokens a second of its record."""
    line = [sys.executable, "-c", HELD, str(gigabytes), str(ROOT / "launch/train.py"), recipe, *overrides]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    name = next(each.removeprefix("run=") for each in overrides if each.startswith("run="))
    lines = list(map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines()))
    median = {key: statistics.median([line[key] for line in lines if key in line][3:]) for key in ("tokens_per_second", "utilisation")}  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(("peak", "machine.compile"))]
    micro_batch = json.loads(Path("runs", name, "machine.json").read_text())["micro_batch"]
    result(**median, micro_batch=micro_batch, said="; ".join(said))


def theirs(recipe_path: str, gigabytes: float, overrides: list[str]) -> None:
    import torch
    from torch.utils.data import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from llm.config.reading import load
    from llm.data.pipeline import prepare_text
    from llm.data.shuffle import WindowShuffle
    from llm.interop.hf_files import model_files
    from llm.model.transformer import Family

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if gigabytes:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / torch.cuda.mem_get_info()[1]))
    recipe = load(Path(recipe_path), overrides)
    prepared = prepare_text(recipe, lambda line: None)
    side, context = prepared.shards.train, recipe.model.context
    order = WindowShuffle(recipe.seed, side.tokens, context)

    class Windows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return order.windows

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            start = int(order.starts(torch.tensor([index]).numpy())[0])
            # Their model shifts the labels itself: one window and its next token are context + 1 ids.
            ids = torch.from_numpy(side.read(start, start + context + 1).astype("int64"))
            return {"input_ids": ids, "labels": ids}

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: object, **options: object) -> None:
            if gigabytes:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    config = json.loads(model_files(recipe.model, prepared.tokenizer, Family())["config.json"])
    windows = recipe.windows_per_step
    sizes = [n for n in range(windows, 0, -1) if windows % n == 0 and (gigabytes or n * context <= 2048)]
    for micro_batch in sizes:
        times.clear()
        model = Qwen3ForCausalLM(Qwen3Config(**config))
        arguments = TrainingArguments(
            output_dir="theirs", max_steps=recipe.train.steps, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=windows // micro_batch, learning_rate=1e-3, lr_scheduler_type="constant",
            optim="adamw_torch_fused", max_grad_norm=recipe.train.clip, weight_decay=recipe.train.weight_decay, use_cpu=not gigabytes,
            bf16=recipe.machine.precision == "bf16", gradient_checkpointing=recipe.machine.recompute, report_to=[], save_strategy="no",
            logging_steps=10**6, disable_tqdm=True, dataloader_pin_memory=bool(gigabytes))  # fmt: skip
        try:
            Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
            break
        except torch.OutOfMemoryError:
            del model
        torch.cuda.empty_cache()
    steps = [b - a for a, b in pairwise(times[2:])]
    peak = f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f}" if gigabytes else ""
    result(recipe.train.tokens_per_step / statistics.median(steps), micro_batch=micro_batch, said=peak)


def ceiling(recipe_path: str, gigabytes: float, overrides: list[str]) -> None:
    """Time the products of a step on random numbers."""
    import torch

    from llm.config.reading import load
    from llm.distributed.environment import DTYPES
    from llm.insight.planning import sized
    from llm.model import cost

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe = load(Path(recipe_path), overrides)
    shape, vocabulary, context = recipe.model, sized(recipe).tokenizer.vocab_size, recipe.model.context
    device, dtype = torch.device("cuda" if gigabytes else "cpu"), DTYPES[recipe.machine.precision]
    rows = recipe.train.tokens_per_step if gigabytes else min(recipe.train.tokens_per_step, max(2048, context))

    def of(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    pairs = []
    for out, width in [*cost.tensors(shape, vocabulary)[0] * shape.layers, (vocabulary, shape.dim)]:
        x, weight, gradient = of(rows, width), of(out, width), of(rows, out)
        pairs += [(x, weight.T), (gradient, weight), (gradient.T, x)]
    q, k = (of(rows // context * shape.heads, each, shape.head_dim) for each in (context // 2, context))
    scores = q @ k.mT
    pairs += [(q, k.mT), (scores, k), (scores.mT, q), (q, k.mT), (scores, k), (scores.mT, q)] * shape.layers
    results, times = [a @ b for a, b in pairs], []
    for _ in range(recipe.train.steps):
        began = time.perf_counter()
        for (a, b), result_of in zip(pairs, results, strict=True):
            torch.matmul(a, b, out=result_of)
        if gigabytes:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    result(rows / statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--shapes", nargs="*", default=["quickstart", "classic", "small"])
    parser.add_argument("--who", nargs="*", default=list(WHO), choices=list(WHO))
    parser.add_argument("--gigabytes", type=float, default=0, help="train on a GPU, held to so much of its memory")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, help="a clone of its source; on a CPU only")
    parser.add_argument("--steps", type=int, default=0, help="of each run, instead of what its shape says")
    parser.add_argument("--only", choices=["ours", "theirs", "ceiling"])
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.only:
        act = {"ours": ours, "theirs": theirs, "ceiling": ceiling}[given.only]
        return act(given.rest[0], given.gigabytes, given.rest[1:])
    print(f"{'tokens a second, ' + given.precision:36}{'min':>10}{'median':>10}{'max':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in given.shapes:
            steps, changes = (GPU_SHAPES if given.gigabytes else SHAPES)[shape]
            clones = {peer: str(clone.resolve()) for peer in PEERS if (clone := getattr(given, peer))}
            found: dict[str, list[dict[str, Any]]] = {who: [] for who in [*given.who, *clones]}
            for _ in range(given.rounds):
                for who, results in found.items():
                    line = [
                        sys.executable,
                        __file__,
                        "--gigabytes",
                        str(given.gigabytes),
                        "--only",
                        who.split(",")[0],
                        "--",
                    ]
                    if who in clones:
                        line = [sys.executable, str(Path(__file__).with_name("peers.py")), "--speed", who, clones[who]]
                    line += [
                        str(ROOT / f"recipes/{shape}.yaml"),
                        *PLAIN,
                        *changes,
                        f"train.steps={given.steps or steps}",
                    ]
                    line += [f"machine.precision={given.precision}", f"text.cache={folder}/cache"]
                    line += [f"run={shape}-{len(results)}-{who.replace(', ', '-')}", *WHO.get(who, [])]
                    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
                    results.append(json.loads(done.stdout.splitlines()[-1]))
                    # At once: the rows below come when all of this shape is done, and a later run may fail.
                    print(f"{shape}, {who}: {results[-1]['tokens_per_second']:,.0f}", file=sys.stderr, flush=True)
            for who, results in found.items():
                speeds = [each["tokens_per_second"] for each in results]
                others = {k: v for k, v in results[-1].items() if k != "tokens_per_second"}
                numbers = f"{min(speeds):10,.0f}{statistics.median(speeds):10,.0f}{max(speeds):10,.0f}"
                print(f"{shape + ', ' + who:36}{numbers}   {others}")
            for who, other in product(("ours", "ours, compiled", "ours, Muon"), ("theirs", *PEERS, "ceiling")):
                if not {who, other} <= set(found):
                    continue
                pairs = zip(found[who], found[other], strict=True)
                ratio = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
                numbers = f"{min(ratio):10.2f}{statistics.median(ratio):10.2f}{max(ratio):10.2f}"
                print(f"{f'{shape}, {who} / {other}':36}{numbers}", flush=True)


if __name__ == "__main__":
    main()
