"""The arithmetic of launch/README.md: python tests/benchmarks/scaling.py. Formulas of llm.model.cost, nothing is measured.

Assumed of each GPU: 150 TFLOP/s in the model's products; 200 GB/s to the others of its node; 6.25 GB/s to other nodes
(400 Gb/s shared by 8). Nothing of the exchange is hidden behind work, which is the worst case.
"""

from pathlib import Path

from llm.config.reading import load
from llm.model import cost

FLOPS, NODE, NETWORK = 150e12, 200e9, 6.25e9


def main() -> None:
    recipe = load(Path(__file__).parent.parent.parent / "recipes/large.yaml")
    shape, vocabulary = recipe.model, recipe.tokenizer.vocabulary
    print(
        "| GPUs | machine.shard | tokens a step | held by each | in the node | between nodes | computing | exchanging | efficiency |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for gpus, windows in ((8, 256), (64, 256), (64, 1024), (1024, 1024), (1024, 8192)):
        for mode in ("none", "hybrid", "full"):
            shard_size = {"none": 1, "hybrid": 8, "full": gpus}[mode]
            if mode == "hybrid" and gpus == 8:
                continue
            micro_batches = max(1, windows // gpus // 8)
            sent = cost.traffic(
                shape,
                vocabulary,
                muon=True,
                shard_size=shard_size,
                replica_size=gpus // shard_size,
                micro_batches=micro_batches,
                gathered=2,
                orthogonalised=2,
            )
            held = cost.memory(shape, vocabulary, muon=True, shard_size=shard_size).total
            inside = {
                "none": sent.replicas * 7 / max(1, gpus - 1),
                "hybrid": sent.shards,
                "full": sent.shards * 7 / (gpus - 1),
            }[mode]
            outside = sent.total - inside
            computing = cost.flops_per_token(shape, vocabulary) * windows * shape.context / gpus / FLOPS
            exchanging = inside / NODE + outside / NETWORK
            share = computing / (computing + exchanging)
            print(
                f"| {gpus:,} | {mode} | {windows * shape.context:,} | {cost.size(held)} | {cost.size(inside)} | {cost.size(outside)} | "
                f"{1000 * computing:.0f} ms | {1000 * exchanging:.0f} ms | {share:.0%} |"
            )


if __name__ == "__main__":
    main()
