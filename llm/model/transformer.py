"""The transformer: Qwen3's architecture under Hugging Face's names, so a checkpoint is a Hugging Face model folder.

Pre-norm RMSNorm, half-split rotary positions, grouped-query attention, QK-norm, SwiGLU, no biases. The matrices that
write into the residual stream start at zero, so every block starts as the identity. Letters in shapes: B windows,
T tokens, D dim, H heads, K kv_heads, E head_dim, F ffn_dim, V vocab_size, L length of a cache.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.base.hashing import mix
from llm.config.schema import Model
from llm.distributed.sharding import local_shard
from llm.model import fused
from llm.model.attention import attention
from llm.model.dropout import dropout
from llm.model.loss import Sampled, Teachers, cross_entropy_sum

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
QK_NORM_INIT = 1.25  # initial QK-norm weight; at 1 some seeds learn to copy repeats 300,000 tokens later
BIAS_INIT = 0.58  # times the root of dim: initial value of the bias feature at the rate BIAS_RATE and above
BIAS_RATE = 0.02  # Muon's default; below it the bias is smaller, as embeddings grow more slowly beside it


@dataclass(frozen=True)
class Family:
    """Architecture details without a recipe key: our models are Qwen3; imported ones may be Llama (no QK-norm)."""

    name: str = "qwen3"  # or "llama"
    rope_theta: float = ROPE_THETA
    norm_eps: float = NORM_EPS
    positions: int = 0  # max_position_embeddings of imported weights; 0: the context


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Cast the weight to the input's type: the fused kernel takes no mixed types.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) on x (B, heads, T, E) with cos and sin of (B or 1, 1, T, E)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Cache:
    """KV cache for `rows` texts of at most `length` tokens each.

    Rows may differ in length: each token is written at its own position, and a query sees keys up to its own position.
    """

    def __init__(self, shape: Model, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        size = (2, shape.layers, rows, shape.kv_heads, length, shape.head_dim)
        self.both = torch.zeros(size, device=device, dtype=dtype)
        self.keys, self.values = self.both  # (layers, B, K, L, E) each
        self.rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self.slots = torch.arange(length, device=device)  # (L,)

    def at(self, positions: Tensor, used: int | None = None) -> None:
        """Use `positions` (B, T) from here on, all below `used`; slots from `used` on are not read."""
        self.positions, self.used = positions, used
        self.mask = self.slots[:used] <= positions[:, None, :, None]  # (B, 1, T, L)

    def row(self, row: int) -> "Cache":
        """The cache of one row alone, in the same memory."""
        one = copy(self)
        one.keys, one.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        one.rows = self.rows[:1]
        return one

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, T, E) of a layer and return all of the layer's that are in use, (B, K, L, E)."""
        self.keys[layer][self.rows, :, self.positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][self.rows, :, self.positions] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]


class Attention(nn.Module):
    def __init__(self, shape: Model, layer: int, family: Family) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, queries, bias=False)
        self.k_proj = nn.Linear(shape.dim, keys, bias=False)
        self.v_proj = nn.Linear(shape.dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.dim, bias=False)
        normed = family.name == "qwen3"
        self.q_norm = RMSNorm(shape.head_dim, family.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, family.norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        split = (*x.shape[:2], -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin)  # (B, H, T, E)
        k = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin)  # (B, K, T, E)
        v = self.v_proj(x).view(split).transpose(1, 2)  # (B, K, T, E)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, L, E)
            q = q.to(k.dtype)
            if x.shape[1] == 1:  # treat heads that share keys as tokens of one head, so that no kernel repeats keys
                q = q.reshape(len(q), self.shape.kv_heads, -1, self.shape.head_dim)
        y = attention(q, k, v, mask if cache is None else cache.mask)  # (B, H, T, E)
        if cache is not None and x.shape[1] == 1:
            y = y.reshape(len(y), self.shape.heads, 1, -1)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def forward_fused(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """The attention of norm(x), with one product for queries, keys and values."""
        heads, kv_heads, size = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        reads = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        mixed = fused.normed_product(x, norm.weight, norm.eps, *reads).unflatten(-1, (-1, size))  # (B, T, H + 2 K, E)
        turning, v = mixed.split([heads + kv_heads, kv_heads], dim=2)
        assert isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm)
        weight = torch.cat([self.q_norm.weight.expand(heads, size), self.k_norm.weight.expand(kv_heads, size)])
        turned = fused.normed_and_turned(turning, weight, cos.transpose(1, 2), sin.transpose(1, 2), self.q_norm.eps)
        q, k, v = (each.transpose(1, 2) for each in (*turned.split([heads, kv_heads], dim=2), v))
        return self.o_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down_proj = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside

    def forward_fused(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """The MLP of norm(x), with one product for gate and up."""
        reads = (self.gate_proj.weight, self.up_proj.weight)
        return self.down_proj(fused.swiglu(fused.normed_product(x, norm.weight, norm.eps, *reads)))


class Block(nn.Module):
    sites: Tensor

    def __init__(self, shape: Model, layer: int, seed: int, family: Family) -> None:
        super().__init__()
        self.rate, self.seed = float(shape.dropout), seed
        self.register_buffer("sites", torch.tensor([2 * layer + 1, 2 * layer + 2]), persistent=False)
        self.input_layernorm = RMSNorm(shape.dim, family.norm_eps)
        self.self_attn = Attention(shape, layer, family)
        self.post_attention_layernorm = RMSNorm(shape.dim, family.norm_eps)
        self.mlp = MLP(shape)

    def drop(self, x: Tensor, windows: Tensor | None, place: int) -> Tensor:
        if windows is None or not self.rate:
            return x
        return dropout(x, windows, seed=self.seed, site=self.sites[place], rate=self.rate)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        windows: Tensor | None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        learns = cache is None and torch.is_grad_enabled() and x.device.type == "cpu"
        learns = learns and not torch.compiler.is_compiling()  # a compiler fuses the modules better than we do
        if learns and type(attention) is Attention and isinstance(attention.q_norm, RMSNorm):
            attended = attention.forward_fused(x, self.input_layernorm, cos, sin, mask)
        else:
            attended = attention(self.input_layernorm(x), cos, sin, cache, mask)
        x = x + self.drop(attended, windows, 0)
        if learns and type(mlp) is MLP:
            changed = mlp.forward_fused(x, self.post_attention_layernorm)
        else:
            changed = mlp(self.post_attention_layernorm(x))
        return x + self.drop(changed, windows, 1)


class _Unused(torch.autograd.Function):
    """Identity on `x` that gives `weights` zero gradients: a sum over ranks waits for each parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


def places(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, T), counted from the start of each segment, and the mask (B, 1, T, T) of attention within it."""
    at = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    firsts = torch.where(begins, at, 0).cummax(1).values
    same = segments[:, :, None] == segments[:, None, :]
    return at - firsts, (same & (at[None, :] <= at[:, None]))[:, None]


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(
        self, shape: Model, vocab_size: int, seed: int, shard_module: Callable[[Block], Block], family: Family
    ) -> None:
        super().__init__()
        self.shape, self.seed, self.rate = shape, seed, float(shape.dropout)
        self.recompute = False  # activation checkpointing of each block
        self.depth = shape.layers  # blocks that learn; those after them must still be the identity
        self.embed_tokens = nn.Embedding(vocab_size, shape.dim)
        self.layers = nn.ModuleList(shard_module(Block(shape, layer, seed, family)) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.dim, family.norm_eps)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        frequencies = 1.0 / family.rope_theta**exponents
        angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context, E)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self, tokens: Tensor, windows: Tensor | None, cache: Cache | None, segments: Tensor | None = None
    ) -> Tensor:
        x = self.embed_tokens(tokens)  # (B, T, D)
        if windows is not None and self.rate:
            x = dropout(x, windows, seed=self.seed, site=0, rate=self.rate)
        at = torch.arange(tokens.shape[1], device=x.device)[None] if cache is None else cache.positions  # (B or 1, T)
        mask = None
        if segments is not None:
            at, mask = places(segments)
        cos, sin = self.cos[at][:, None].to(x.dtype), self.sin[at][:, None].to(x.dtype)  # (B or 1, 1, T, E)
        for layer, block in enumerate(self.layers):
            if layer >= self.depth and torch.is_grad_enabled():
                x = _Unused.apply(x, *block.parameters())
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, windows, None, mask, use_reentrant=False, preserve_rng_state=False)
            elif cache is None:
                x = block(x, cos, sin, windows, None, mask)
            else:  # bypass compilation, which would recompile for each layer and each length
                x = block._call_impl(x, cos, sin, windows, cache)
        return self.norm(x)  # (B, T, D)


class Transformer(nn.Module):
    """Loss of a batch, or logits. `shape` is resolved (resolving.resolve); the initial weights depend on `seed` alone.

    `shard_module` may shard each block as soon as it is made, so that no process ever holds all blocks whole.
    """

    def __init__(
        self,
        shape: Model,
        vocab_size: int,
        seed: int = 0,
        shard_module: Callable[[Block], Block] = lambda block: block,
        family: Family = Family(),
    ) -> None:
        super().__init__()
        self.shape, self.family = shape, family
        self.sampled: Sampled | None = None  # what the softmax covers where gradients are wanted; None: all pieces
        self.teachers: tuple[Transformer, ...] = ()  # whose probabilities are learnt too; no part of this model
        self.teachers_share = 0.0  # of each target
        self.model = Decoder(shape, vocab_size, seed, shard_module, family)
        self.lm_head = nn.Linear(shape.dim, vocab_size, bias=False)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialise(seed)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initialise each tensor from its own generator, so that no tensor's values depend on another tensor."""
        for index, (name, weight) in enumerate(self.named_parameters()):
            if weight.ndim < 2:  # norms, or what a caller's own block has
                of_qk = name.endswith(("q_norm.weight", "k_norm.weight"))
                weight.fill_(QK_NORM_INIT if of_qk else 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            else:
                # Tied embeddings start small, or each token would predict itself; the loss starts at log(vocab_size).
                init_std = {"embed_tokens": 4 / self.shape.dim if self.shape.tied else 0.02, "lm_head": 0.001}
                std = init_std.get(name.split(".")[-2], self.shape.dim**-0.5)
                generator = torch.Generator().manual_seed(mix(seed, index) >> 1)
                drawn = torch.randn(weight.shape, generator=generator, device="cpu") * std
                rows = local_shard(weight)
                rows.local.copy_(drawn[rows.low : rows.low + len(rows.local)])

    @torch.no_grad()
    def start_with_bias(self, learning_rate: float) -> None:
        """Set the last feature of tied embeddings to one value for all tokens: a bias for each matrix that reads it.

        The last norm hides it from the logits, which it would disturb. It suits Muon's `learning_rate`; AdamW's
        embeddings grow too slowly beside it. `recipes/experiments.md` has the figures. Call it before sharding.
        """
        if self.shape.tied:
            share = min(1.0, learning_rate / BIAS_RATE)
            self.model.embed_tokens.weight[:, -1] = BIAS_INIT * share * self.shape.dim**0.5
            self.model.norm.weight[-1] = 0

    @torch.no_grad()
    def start_with_prefixes(self, prefixes: Tensor) -> None:
        """Add to the embedding of each piece that of its prefix as drawn, so that pieces that begin alike start alike.

        `prefixes` (V,) are ids, -1 for none. Call it before `start_with_bias`, and before sharding.
        """
        embeddings, has = self.model.embed_tokens.weight, prefixes >= 0
        embeddings += embeddings[prefixes.clamp(min=0)] * has[:, None]

    def forward(
        self, tokens: Tensor, targets: Tensor, windows: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Summed cross-entropy of `targets` (B, T) after `tokens` (B, T), without IGNORED targets: nats, fp32 scalar.

        `windows` (B,) are the windows' positions in the data order, which determine dropout; without them it is off.
        With `segments` (B, T) tokens see those before them of their own segment only, and positions count from its
        start.
        """
        hidden = self.model(tokens, windows, None, segments).flatten(0, 1)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if not torch.is_grad_enabled():
            return cross_entropy_sum(hidden, self.lm_head.weight, targets.flatten())
        teachers = None
        if self.teachers:
            with torch.no_grad():
                states = [each.model(tokens, None, None, segments).flatten(0, 1) for each in self.teachers]
            teachers = Teachers(states, [each.lm_head.weight for each in self.teachers], self.teachers_share)
        return cross_entropy_sum(hidden, self.lm_head.weight, targets.flatten(), self.sampled, teachers)

    def logits(self, tokens: Tensor, cache: Cache | None = None, last: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) after `tokens` (B, T), or (B, V) after the token at index `last` (B,) of each row only."""
        hidden = self.model(tokens, None, cache)
        return self.lm_head(hidden if last is None else hidden[torch.arange(len(last), device=last.device), last])
