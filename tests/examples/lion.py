"""Another optimizer: Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023).

llm.train(llm.load_recipe("quickstart", ["run=lion", "train.learning_rate=3e-4"]), optimizer=Lion)
"""

import torch
from torch import Tensor, nn

from llm.config.schema import Train
from llm.distributed.sharding import Sharding, local_shard

BETA1, BETA2 = 0.9, 0.99


class Lion:
    """Works on this rank's shard of each tensor, so it runs on any number of processes, sharded or not."""

    def __init__(self, model: nn.Module, train: Train, orthogonalise_in: torch.dtype, sharding: Sharding) -> None:
        self.train, self.parameters = train, dict(model.named_parameters())
        shards = {f"{name}/momentum": local_shard(p) for name, p in self.parameters.items()}
        self.moments = {name: shard.like(torch.zeros_like(shard.local)) for name, shard in shards.items()}

    @torch.no_grad()
    def step(self, step: int, lr_factor: float, scale: Tensor, finite: Tensor) -> None:
        rate, decay = self.train.learning_rate * lr_factor, float(self.train.weight_decay)
        for name, p in self.parameters.items():
            weight, momentum = local_shard(p).local, self.moments[f"{name}/momentum"].local
            gradient = torch.where(finite, local_shard(p.grad).local * scale, momentum)  # else the momentum stays
            update = momentum.lerp(gradient, 1 - BETA1).sign()
            if p.ndim == 2:
                update.add_(weight, alpha=decay)
            weight.sub_(update * (rate * finite))
            momentum.lerp_(gradient, 1 - BETA2)
            p.grad = None
