"""Speed on a quiet machine and beside a busy program, by how OpenMP's threads wait: python tests/benchmarks/neighbours.py [ROUNDS]

Quickstart's shape in fp32. Each policy has a process of its own; they take turns, and one is at work at a time. The neighbour is
an endless loop that may use every core.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

POLICIES = {
    "as we do": {},
    "always spin": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "never spin": {"OMP_WAIT_POLICY": "passive"},
}
SETTLE, SECONDS = 0.8, 1.2
NEIGHBOUR = [sys.executable, "-c", "while True: pass"]


def serve() -> None:
    """Tokens a second, for each line of stdin that names something to do."""
    import torch

    from llm.config.reading import load
    from llm.config.resolving import with_steps
    from llm.distributed import threads
    from llm.distributed.sharding import Sharding, local_shard
    from llm.inference.generation import Sampling, generate
    from llm.insight.planning import sized
    from llm.model.transformer import Transformer
    from llm.optim.optimizer import Optimizer, gradient_norm

    torch.set_num_threads(threads.threads_per_process())
    threads.yield_to_neighbours()
    recipe = with_steps(load(Path("recipes/quickstart.yaml"), ["train.learning_rate=0"]), 1_400_000)
    vocabulary, sharding = sized(recipe).tokenizer.vocab_size, Sharding()
    model = Transformer(recipe.model, vocabulary, 1)
    optimizer = Optimizer(model, recipe.train, torch.float32)
    tokens = torch.randint(vocabulary, (recipe.windows_per_step, recipe.model.context + 1))

    def train() -> int:
        model.train()
        (model(tokens[:, :-1], tokens[:, 1:]) / recipe.train.tokens_per_step).backward()
        gradient_norm([local_shard(p.grad) for p in model.parameters() if p.grad is not None], sharding)
        optimizer.step(1, 1.0, torch.ones(()), torch.tensor(True))
        return recipe.train.tokens_per_step

    def evaluate() -> int:
        with torch.no_grad():
            model.eval()(tokens[:, :-1], tokens[:, 1:]).item()
        return recipe.train.tokens_per_step

    def sample() -> int:
        return sum(1 for _ in generate(model.eval(), [[1, 5, 6, 7]], 30, Sampling(), 1, (1,), ()))

    def rate(act: Callable[[], int], seconds: float) -> float:
        began, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            count += act()
        return count / passed

    acts = {"train": train, "evaluate": evaluate, "sample": sample}
    for act in acts.values():
        rate(act, 0.5)
    print("ready", flush=True)
    for line in sys.stdin:
        rate(acts[line.strip()], SETTLE)
        print(rate(acts[line.strip()], SECONDS), flush=True)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    figures: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:

        def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            return process

        servers = {name: start([sys.executable, __file__, "serve"], **policy) for name, policy in POLICIES.items()}

        def said(server: subprocess.Popen[str]) -> str:
            assert server.stdout is not None
            return server.stdout.readline().strip()

        assert all(said(each) == "ready" for each in servers.values())
        for _ in range(rounds):
            for where in ("quiet", "beside a busy program"):
                neighbour = start(NEIGHBOUR) if where != "quiet" else None
                for work in ("train", "evaluate", "sample"):
                    for name, server in servers.items():
                        print(work, file=server.stdin, flush=True)
                        figures.setdefault((work, where, name), []).append(float(said(server)))
                if neighbour is not None:
                    neighbour.kill()
                    neighbour.wait()
    print(f"{'tokens/s':46}{'min':>8}{'median':>8}{'max':>8}{'of spinning, quiet':>20}")
    for (work, where, name), values in figures.items():
        middle = statistics.median(values)
        best = figures[work, "quiet", "always spin"]
        gain = statistics.median(value / each for value, each in zip(values, best, strict=True))
        print(f"{f'{work}, {where}, {name}':46}{min(values):8.0f}{middle:8.0f}{max(values):8.0f}{gain:20.0%}")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
