"""Another block: an MLP of squared ReLU, without a gate (So et al., "Primer", 2021).

llm.train(llm.load_recipe("quickstart", ["run=relu"]), model=relu_squared)
llm.open_run("relu", model=relu_squared).generate("My self Har")
"""

from torch import Tensor, nn

from llm.config.schema import Model
from llm.model.transformer import Family, Transformer


class ReluSquared(nn.Module):
    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.up_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down_proj = nn.Linear(shape.ffn_dim, shape.dim, bias=False)  # starts at zero, as its name is known

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu().square())


def relu_squared(shape, vocab_size, seed, shard_module=lambda block: block, family=Family()):  # type: ignore[no-untyped-def]
    """The transformer with each block's MLP replaced before the block is sharded."""

    def changed(block: nn.Module) -> nn.Module:
        block.mlp = ReluSquared(shape)
        return shard_module(block)

    return Transformer(shape, vocab_size, seed, changed, family)
