"""Fast decoding of one token per row: `GraphDecoder` replays a CUDA graph of the model's own step, `FastDecoder` runs
the model's arithmetic on a CPU over a copy of the weights in a layout of its own.

On a CPU the cost per token is reading the weights once plus a few torch calls per block. So matrices that read the same
vector are merged; a norm's weight is folded into the next matrix; matrices are stored in the layout that is read
fastest (for one row transposed if wide, for several rows in blocks if large); and all rows write the same slot of the
cache, so that a slice suffices.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkldnn

from llm.model.transformer import MLP, Attention, Block, Cache, Decoder, RMSNorm, Transformer

PACKED = 1 << 16  # numbers above which a matrix does not stay in the CPU's cache between tokens

# Modules of our own models: FastDecoder copies their arithmetic, GraphDecoder records it.
KNOWN = (Transformer, Decoder, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)


def merged(norm: RMSNorm, *projections: nn.Linear) -> Tensor:
    """One matrix (all outputs, D) of the projections, with the norm's weight folded in; it expects `unit` vectors."""
    columns = torch.cat([projection.weight.t() for projection in projections], dim=1)
    return columns.mul_(norm.weight[:, None] * len(norm.weight) ** 0.5).t()


class Product:
    """Product of x (rows, D) and a matrix (outputs, D), stored in the fastest layout for this number of rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        outputs, dim = weight.shape
        large = weight.numel() >= PACKED and weight.dtype == torch.float32
        self.packed = rows > 1 and large and mkldnn.is_available()
        if self.packed:  # the kernel's blocked order, as torch's compiler uses for constant weights
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            self.weight = weight.t().contiguous() if outputs > dim else weight.t()  # (D, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return x @ self.weight

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x plus the product of y and the matrix."""
        return x + self(y) if self.packed else torch.addmm(x, y, self.weight)


def unit(x: Tensor, least: Tensor) -> Tensor:
    """RMSNorm without its weight and the factor sqrt(size): three calls, where the fused one takes ten on a CPU.

    `least` is sqrt(size * epsilon).
    """
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)


class FastDecoder:
    """Continues from a cache that holds texts of `lengths`, padded at the end. Letters as in transformer.py.

    Keys already carry their rotary positions, so slots need not match positions: in all rows new tokens follow the
    longest text, and the padding of shorter rows is masked.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, cache: Cache) -> None:
        shape, decoder = model.shape, model.model
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.embedding, self.cos, self.sin = decoder.embed_tokens.weight, decoder.cos, decoder.sin
        self.keys, self.values, self.slots = cache.keys.unbind(), cache.values.unbind(), cache.slots
        rows, self.blocks, head = len(cache.rows), [], (shape.head_dim,)
        norms: list[Tensor] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            reads = merged(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gates = merged(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            matrices = (reads, attention.o_proj.weight, gates, mlp.down_proj.weight)
            self.blocks.append([Product(weight, rows) for weight in matrices])
            for norm, count in ((attention.q_norm, shape.heads), (attention.k_norm, shape.kv_heads)):
                norms += [norm.weight if isinstance(norm, RMSNorm) else torch.full(head, shape.head_dim**-0.5)] * count
        self.head = Product(merged(decoder.norm, model.lm_head), rows)
        self.norms = torch.stack(norms).view(shape.layers, 1, -1, shape.head_dim) * shape.head_dim**0.5
        self.normed = isinstance(attention.q_norm, RMSNorm)  # Llama has no QK-norm
        eps = decoder.norm.eps
        self.least, self.least_head = (torch.tensor((n * eps) ** 0.5) for n in (shape.dim, shape.head_dim))
        left, right = self.norms.chunk(2, dim=-1)  # of (layers, 1, H + K, E)
        self.crossed = torch.cat((-right, left), dim=-1)

    def begin(self, lengths: list[int]) -> None:
        self.used = max(lengths)
        self.positions = torch.tensor(lengths)
        behind = (self.slots < self.positions[:, None]) | (self.slots >= self.used)
        self.mask = None if min(lengths) == self.used else behind[:, None, None]  # (B, 1, 1, L)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after the next token of each row, `tokens` (B,)."""
        rows, slot = len(tokens), self.used
        rotated = self.heads + self.kv_heads
        grouped = (rows, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        self.used += 1
        mask = None if self.mask is None else self.mask[..., : self.used]
        cos = (self.norms * self.cos[self.positions][:, None]).unbind()  # (B, H + K, E) each
        sin = (self.crossed * self.sin[self.positions][:, None]).unbind()
        self.positions = self.positions + 1
        x = self.embedding[tokens]  # (B, D)
        for layer, (reads, writes, gates, down) in enumerate(self.blocks):
            heads = reads(unit(x, self.least)).view(rows, -1, self.head_dim)  # (B, H + K + K, E)
            qk = unit(heads[:, :rotated], self.least_head) if self.normed else heads[:, :rotated]
            qk = torch.addcmul(qk * cos[layer], qk.roll(self.head_dim // 2, -1), sin[layer])
            keys, values = self.keys[layer], self.values[layer]  # (B, K, L, E)
            keys[:, :, slot] = qk[:, self.heads :]
            values[:, :, slot] = heads[:, rotated:]
            # Heads that share keys are passed as queries of one head.
            q = qk[:, : self.heads].view(grouped)
            y = F.scaled_dot_product_attention(q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=mask)
            x = writes.added(x, y.reshape(rows, -1))
            gate, up = gates(unit(x, self.least)).chunk(2, dim=-1)
            x = down.added(x, F.silu(gate) * up)
        return self.head(unit(x, self.least))


class GraphDecoder:
    """The model's own step, recorded once as a CUDA graph and replayed.

    One launch replaces about thirty per block. A graph always reads the same part of the cache, so there is one for
    each of a few lengths; slots after a row's position are masked.
    """

    LEAST = 128  # slots of the shortest graph; each following graph has twice as many
    # Streams to record on; reused, as libraries keep a buffer per stream.
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(len(cache.rows), 1, dtype=torch.int64, device=cache.keys.device)
        self.positions = torch.zeros_like(self.tokens)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def begin(self, lengths: list[int]) -> None:
        self.positions.copy_(torch.tensor(lengths)[:, None])
        self.longest = max(lengths)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after the next token of each row, `tokens` (B,); the next step overwrites them."""
        self.tokens.copy_(tokens[:, None])
        self.longest += 1
        slots = self.LEAST
        while slots < self.longest:
            slots *= 2
        slots = min(slots, len(self.cache.slots))
        if slots not in self.graphs:
            self.graphs[slots] = self.record(slots)
        graph, logits = self.graphs[slots]
        with torch.cuda.device(self.tokens.device):
            graph.replay()
        self.positions += 1
        return logits

    def record(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step that reads the first `slots` of the cache. Running it twice writes the same keys again."""

        def act() -> Tensor:
            self.cache.at(self.positions, slots)
            return self.model.logits(self.tokens, self.cache)[:, -1]

        strict = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # each slot is written once, so sorting kernels are not needed
        try:
            device = self.tokens.device
            with torch.cuda.device(device):
                if device not in self.streams:
                    self.streams[device] = torch.cuda.Stream()
                side_stream, graph = self.streams[device], torch.cuda.CUDAGraph()
                side_stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side_stream):
                    act()  # libraries allocate buffers at the first call, which must not be recorded
                torch.cuda.current_stream().wait_stream(side_stream)
                with torch.cuda.graph(graph, stream=side_stream):
                    logits = act()
        finally:
            torch.use_deterministic_algorithms(strict)
        return graph, logits
