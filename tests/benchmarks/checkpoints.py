"""What a checkpoint costs the training: python tests/benchmarks/checkpoints.py [--rounds N] [--kinds KIND ...] [--steps N] [--record FILE] [--set key=value ...]

Steps of a model of 100 M parameters by the real trainer, in turn without a checkpoint, with one that is written beside them,
and with one that they wait for. Each block ends when its checkpoint is durable. `--record` adds the rounds to a file and sums
up all that are in it. Beside the seconds of the blocks: for how long the training stood still, by how much the steps during a
write were slower than the block's others, and the processor's time that the writing thread took, which is the most that it can
cost; each as a share of ten steps. `--steps` are done in a block, where ten would take too long.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from threading import Event
from typing import Any

from safety import real_trainer

from llm.config.reading import load
from llm.run_folder.background import BackgroundWork
from llm.training.trainer import Trainer

STEPS = 10
SHAPE = ["model.dim=768", "model.layers=14", "model.heads=12", "model.context=256", "train.tokens_per_step=2048"]
KINDS = ("without", "beside", "waiting")


def timed_thread(found: list[dict[str, float]]) -> None:
    """From here on each part of a background write leaves its seconds in `found`."""
    do = BackgroundWork._do

    def timed(self: BackgroundWork, part: Any, done: Event) -> None:
        began, held = time.perf_counter(), Event()
        do(self, part, held)
        found.append({"cpu": time.thread_time(), "wall": time.perf_counter() - began})
        done.set()

    BackgroundWork._do = timed  # type: ignore[method-assign]


def block(trainer: Trainer, kind: str, steps_: int, threads: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of `steps_` steps after a checkpoint of this kind, to the end of both, and what they are made of."""
    checkpoints, state = trainer.checkpoints, trainer.state
    threads.clear()
    checkpoints.saved = -1  # this step may have been saved
    began = time.perf_counter()
    if kind != "without":
        checkpoints.save(evaluation_due=False, in_background=kind == "beside")
    saved = time.perf_counter()
    steps: list[tuple[float, bool]] = []
    for _ in range(steps_):
        busy, since = checkpoints.writing.done is not None, time.perf_counter()
        loss, _ = trainer.update(state.step)
        loss.item()
        state.step += 1
        checkpoints.writing.poll()
        steps.append((time.perf_counter() - since, busy))
    ended = time.perf_counter()
    checkpoints.writing.wait()
    done = time.perf_counter()
    trainer.monitor.check(lambda: -1)
    usual = statistics.median(seconds for seconds, busy in steps if not busy) if not all(b for _, b in steps) else 0.0
    return {
        "seconds": done - began,
        "ten steps": (done - began) / steps_ * STEPS if kind == "without" else usual * STEPS,
        "still": saved - began + done - ended,
        "slower": sum(seconds - usual for seconds, busy in steps if busy) if usual else 0.0,
        "thread cpu": sum(each["cpu"] for each in threads),
        "thread wall": sum(each["wall"] for each in threads),
    }


def rounds(number: int, kinds: list[str], steps: int, overrides: list[str]) -> list[dict[str, dict[str, float]]]:
    path, data = Path("recipes/quickstart.yaml").absolute(), Path("data").absolute()
    recipe = load(path, [*SHAPE, *overrides, f"text.cache={data}", "run=saves", "checkpoint.keep=1"])
    threads: list[dict[str, float]] = []
    timed_thread(threads)
    with real_trainer(recipe) as trainer:
        settings = trainer.context.settings
        trainer.micro_batches.rehearse()
        print(
            f"{trainer.state.parameters / 1e6:.1f} M parameters, {settings.precision}, {settings.threads} threads",
            end="",
        )
        print(f", {recipe.train.tokens_per_step:,} tokens a step")
        trainer.update(0)
        trainer.state.step = 1
        checkpoints = trainer.checkpoints
        checkpoints.save(evaluation_due=False, in_background=True)  # its memory is taken once
        checkpoints.writing.wait()
        found = []
        for number_ in range(number):
            order = kinds if number_ % 2 == 0 else kinds[::-1]
            found.append({})
            for kind in order:
                found[-1][kind] = block(trainer, kind, steps, threads)
                print(kind, {name: round(value, 3) for name, value in found[-1][kind].items()}, flush=True)
        size = sum(path.stat().st_size for path in (trainer.context.folder / "checkpoints").rglob("*.safetensors"))
        print(f"a checkpoint: {size / 1e9:.2f} GB")
    return found


def row(name: str, values: list[float]) -> None:
    print(f"{name:50}{min(values):9.2f}{statistics.median(values):9.2f}{max(values):9.2f}   of {len(values)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key=value of the recipe")
    given = parser.parse_args()
    found = json.loads(given.record.read_text()) if given.record and given.record.exists() else []
    found += rounds(given.rounds, given.kinds, given.steps, given.set)
    if given.record:
        given.record.write_text(json.dumps(found))
    by_kind = {kind: [each[kind] for each in found if kind in each] for kind in KINDS}
    print(f"{'':50}{'min':>9}{'median':>9}{'max':>9}")
    for kind, blocks in by_kind.items():
        if blocks:
            row(f"{kind}, seconds of {STEPS} steps alone", [each["ten steps"] for each in blocks])
    parts = {
        "it stood still": ["still"],
        "with slower steps": ["still", "slower"],
        "thread's CPU at most": ["still", "thread cpu"],
    }
    for kind, blocks in list(by_kind.items())[1:]:
        for name, what in parts.items() if blocks else ():
            lost = [100 * sum(each[part] for part in what) / each["ten steps"] for each in blocks]
            row(f"{kind}, % of them: {name}", lost)
    for name in ("thread cpu", "thread wall") if by_kind["beside"] else ():
        row(f"{name}, seconds", [each[name] for each in by_kind["beside"]])


if __name__ == "__main__":
    main()
