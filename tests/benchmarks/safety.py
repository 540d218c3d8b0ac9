"""What the promises cost a user who needs none of them: python tests/benchmarks/safety.py [RECIPE] [key=value ...]

Blocks of ten steps of the real trainer, with and without, in turn: asking whether to stop, masking of what is not finite, the norm
that no world changes, reading of the masks, the rolling record. CPU time of the process, so that neighbours do not count. Then a
checkpoint with its digests and its flush to the disk, against plain writing of the same tensors, by the recipe's cadence.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import llm.training.step
from llm.config.reading import load
from llm.config.schema import Recipe
from llm.distributed.environment import DTYPES, start_group
from llm.distributed.sharding import LocalShard, Sharding
from llm.interop.pretrained import ready
from llm.run_folder import trace
from llm.training.context import RunContext
from llm.training.trainer import Trainer

ROUNDS, BLOCK = 12, 10


def plain_norm(gradients: list[LocalShard], sharding: Sharding) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([each.local for each in gradients]).double()


@contextmanager
def without(trainer: Trainer) -> Iterator[None]:
    """None of the promises: neither masks nor records."""
    kept = torch.where, llm.training.step.gradient_norm
    torch.where = lambda condition, this, other: this  # type: ignore[assignment]
    llm.training.step.gradient_norm = plain_norm
    monitor, stop = trainer.monitor, trainer.stop
    for part, name in ((monitor, "check"), (monitor, "record"), (stop, "agreed")):
        setattr(part, name, lambda given: None)
    try:
        yield
    finally:
        torch.where, llm.training.step.gradient_norm = kept
        for part, name in ((monitor, "check"), (monitor, "record"), (stop, "agreed")):
            delattr(part, name)
        trainer.gradient_step.finite_flags.clear()


def block(trainer: Trainer) -> float:
    """CPU seconds of BLOCK steps and what follows them before a line is printed."""
    began = time.process_time()
    for _ in range(BLOCK):
        trainer.stop.agreed(trainer.state.step)
        loss, _ = trainer.update(trainer.state.step)
        trainer.state.step += 1
    trainer.monitor.check(lambda: -1)
    trainer.monitor.record(loss)
    loss.item()
    return time.process_time() - began


def seconds_of(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


@contextmanager
def real_trainer(recipe: Recipe) -> Iterator[Trainer]:
    """The trainer of a run in a temporary folder, which is the current one meanwhile."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        run = Path("runs") / recipe.run
        accelerator, coordinator, settings = start_group(recipe, run)
        recipe, tokenizer, shards = ready(recipe, print)
        split = Sharding(settings.shard, accelerator.device, DTYPES[settings.precision])
        yield Trainer(RunContext(recipe, settings, tokenizer, shards, accelerator, coordinator, split, run))


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/quickstart.yaml").absolute()
    recipe = load(path, [*sys.argv[2:], f"text.cache={Path('data').absolute()}", "run=safety"])
    with real_trainer(recipe) as trainer:
        run = trainer.context.folder
        record = trainer.monitor.trace = trace.Trace(run, 0)
        found: dict[str, list[float]] = {"without": [], "with": []}
        for round in range(-1, ROUNDS):
            for name in sorted(found, reverse=round % 2 == 0):  # each goes first every other time
                if name == "without":
                    with without(trainer):
                        took = block(trainer)
                        record.step = trainer.state.step  # its windows are nobody's
                else:
                    took = block(trainer)
                if round >= 0:
                    found[name].append(took / BLOCK)
        print(f"{'CPU milliseconds a step':34}{'min':>9}{'median':>9}{'max':>9}")
        for name, seconds in found.items():
            print(f"{name:34}{1e3 * min(seconds):9.2f}{1e3 * statistics.median(seconds):9.2f}{1e3 * max(seconds):9.2f}")
        ratios = [100 * (a / b - 1) for a, b in zip(found["with"], found["without"], strict=True)]
        price = 100 * (statistics.median(found["with"]) / statistics.median(found["without"]) - 1)
        print(
            f"{'price, % of a step':34}{min(ratios):9.2f}{statistics.median(ratios):9.2f}{max(ratios):9.2f}   (of medians: {price:.2f})"
        )

        def plain() -> None:
            save_file({name: rows.local for name, rows in trainer.state.weights().items()}, "plain-weights")
            save_file({name: rows.local for name, rows in trainer.state.optimizer.moments.items()}, "plain-moments")

        saves: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(5):
            saves["plain"].append(seconds_of(plain))
            trainer.state.step += 1
            saves["ours"].append(
                seconds_of(lambda: trainer.checkpoints.save(evaluation_due=False, in_background=False))
            )
        extra = statistics.median(saves["ours"]) - statistics.median(saves["plain"])
        share = 100 * extra / recipe.checkpoint.every / statistics.median(found["without"])
        print(
            f"a checkpoint: {1e3 * statistics.median(saves['ours']):.0f} ms of CPU, plain {1e3 * statistics.median(saves['plain']):.0f} ms: "
            f"{share:.2f} % of a step at one in {recipe.checkpoint.every}"
        )


if __name__ == "__main__":
    main()
