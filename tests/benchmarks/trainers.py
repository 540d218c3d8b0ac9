"""Tokens a second against Hugging Face's Trainer at equal shape, data, cores and precision: python tests/benchmarks/trainers.py

Both train Qwen3's architecture with fused AdamW from the same windows of the packaged text, without dropout, evaluation or
checkpoints; each in processes of its own, in turn. A step's time is the median of its run without the first three.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPES = {
    "quickstart": (30, ["train.tokens_per_step=2048"]),
    "classic": (9, ["train.tokens_per_step=4096", "model.dropout=0"]),
    "small": (7, ["train.tokens_per_step=4096"]),
}
PLAIN = ["text.files=[wiki-leads]", "evaluate.every=100k", "checkpoint.every=100k", "evaluate.prompts=[]", "tracking.every=1",
         "train.optimizer=adamw", "train.learning_rate=1e-3", "train.weight_decay=0.1", "model.dropout=0", "train.warmup=0", "train.decay=0"]  # fmt: skip


def ours(recipe: str, overrides: list[str]) -> None:
    """Run the launch script; print the median tokens a second of its record."""
    subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), recipe, *overrides], check=True, stdout=subprocess.DEVNULL
    )
    name = next(each.removeprefix("run=") for each in overrides if each.startswith("run="))
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    print(statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][3:]))


def theirs(recipe_path: str, overrides: list[str]) -> None:
    import torch
    from torch.utils.data import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from llm.huggingface import model_files
    from llm.model import Family
    from llm.order import Order
    from llm.prepare import prepare
    from llm.recipe import load

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe = load(Path(recipe_path), overrides)
    prepared = prepare(recipe, lambda line: None)
    side, context = prepared.shards.train, recipe.model.context
    order = Order(recipe.seed, side.tokens, context)

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
            times.append(time.perf_counter())

    config = json.loads(model_files(recipe.model, prepared.tokenizer, Family())["config.json"])
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    micro_batch = max(
        n for n in range(1, recipe.windows_per_step + 1) if recipe.windows_per_step % n == 0 and n * context <= 2048
    )
    arguments = TrainingArguments(
        output_dir="theirs", max_steps=recipe.train.steps, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe.windows_per_step // micro_batch, learning_rate=1e-3, lr_scheduler_type="constant",
        optim="adamw_torch_fused", max_grad_norm=recipe.train.clip, weight_decay=recipe.train.weight_decay, use_cpu=True,
        bf16=recipe.machine.precision == "bf16", report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True,
        dataloader_pin_memory=False)  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
    steps = [b - a for a, b in pairwise(times[2:])]
    print(recipe.train.tokens_per_step / statistics.median(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.only:
        return (ours if given.only == "ours" else theirs)(given.rest[0], given.rest[1:])
    print(f"{'tokens a second, ' + given.precision:28}{'min':>10}{'median':>10}{'max':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in given.shapes:
            steps, changes = SHAPES[shape]
            found: dict[str, list[float]] = {"ours": [], "theirs": [], "ours, Muon": []}
            for round in range(given.rounds):
                for who, speeds in found.items():
                    line = [
                        sys.executable,
                        __file__,
                        "--only",
                        who.split(",")[0],
                        "--",
                        str(ROOT / f"recipes/{shape}.yaml"),
                        *PLAIN,
                    ]
                    line += [
                        *changes,
                        f"train.steps={steps}",
                        f"machine.precision={given.precision}",
                        f"text.cache={folder}/cache",
                    ]
                    line += [f"run={shape}-{who[-4:]}-{round}"]
                    line += ["train.optimizer=muon", "train.learning_rate=0.02"] if "Muon" in who else []
                    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
                    speeds.append(float(done.stdout.split()[-1]))
            for who, speeds in found.items():
                print(
                    f"{shape + ', ' + who:28}{min(speeds):10,.0f}{statistics.median(speeds):10,.0f}{max(speeds):10,.0f}"
                )
            ratio = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
            print(
                f"{shape + ', ours / theirs':28}{min(ratio):10.2f}{statistics.median(ratio):10.2f}{max(ratio):10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
