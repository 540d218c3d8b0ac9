"""Peak memory and time of real steps of a large shape with and without recomputed activations, each in a process of its own.

    python tests/benchmarks/recompute.py [RECIPE] [STEPS] [key=value ...]
    python tests/benchmarks/recompute.py recipes/large.yaml 3 train.optimizer=adamw train.learning_rate=1e-3

Random tokens, the recipe's own model section and vocabulary, one window a step. The losses of both are compared:
recomputing may change nothing but memory and time. Muon's update takes minutes at this size on two cores, AdamW's
seconds. Linux only, as VmHWM is read.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[2]))


def steps(recipe: str, count: int, overrides: list[str], recompute: bool) -> dict[str, Any]:
    """Losses, seconds and peak bytes of `count` updates, in this process."""
    import torch

    from llm.config.reading import load
    from llm.config.resolving import with_steps
    from llm.insight.planning import sized
    from llm.model.transformer import Transformer
    from llm.optim.optimizer import Optimizer

    loaded = with_steps(load(Path(recipe), overrides), 1_400_000)  # tokens of a text, by which `auto` is settled
    context, vocabulary = loaded.model.context, sized(loaded).tokenizer.vocab_size
    model = Transformer(loaded.model, vocabulary, seed=1)
    model.model.recompute = recompute
    optimizer = Optimizer(model, loaded.train)
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    tokens = torch.randint(vocabulary, (1, context + 1), generator=torch.Generator().manual_seed(1))
    losses, began = [], time.perf_counter()
    for step in range(count):
        model.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:], torch.arange(1)) / context
        loss.backward()
        optimizer.step(step, 0.1, torch.ones(()), torch.tensor(True))
        losses.append(loss.item())
    seconds = (time.perf_counter() - began) / count
    peak = next(
        int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return {"losses": losses, "seconds": seconds, "built": built, "peak": peak}


def measured(recipe: str, count: int, overrides: list[str], recompute: bool) -> dict[str, Any]:
    """The same in a fresh process."""
    given = [sys.executable, __file__, "--one", str(int(recompute)), recipe, str(count), *overrides]
    done = subprocess.run(given, capture_output=True, text=True, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        _, _, recompute, recipe, count, *overrides = sys.argv
        print(json.dumps(steps(recipe, int(count), overrides, recompute == "1")))
        return
    recipe, count, *overrides = [*sys.argv[1:], *(str(ROOT / "recipes" / "large.yaml"), "3")[len(sys.argv[1:]) :]]
    print(f"{Path(recipe).stem}, {count} steps of one window {' '.join(overrides)}")
    print("| recompute | losses | s a step | GB when built | GB at the peak |\n|---|---|---|---|---|", flush=True)
    found = []
    for name, recompute in (("no", False), ("yes", True)):
        found.append(each := measured(recipe, int(count), overrides, recompute))
        losses = ", ".join(f"{loss:.6f}" for loss in each["losses"])
        numbers = f"{each['seconds']:.1f} | {each['built'] / 1e9:.2f} | {each['peak'] / 1e9:.2f}"
        print(f"| {name} | {losses} | {numbers} |", flush=True)
    print("losses are equal" if found[0]["losses"] == found[1]["losses"] else "LOSSES DIFFER")


if __name__ == "__main__":
    main()
