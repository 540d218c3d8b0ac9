"""Fast decoding of one token per row: `GraphDecoder` replays a CUDA graph of the model's own step, `FastDecoder` runs
the model's arithmetic on a CPU over a copy of the weights in a layout of its own.

On a CPU the cost per token is reading the weights once plus a few torch calls per block. So matrices that read the same
vector are merged, and a norm's weight is folded into the next matrix. A row's bits must ignore its neighbours: each row
reads a part of the cache that depends on its own length alone, and the number of rows is one whose kernels round as
those of 16 rows do.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.transformer import MLP, Attention, Block, Cache, Decoder, RMSNorm, Transformer

SLOTS = 16  # rows that are decoded at once
WIDTHS = (2, 4, 8)  # fewer rows, where they round alike; one alone is another kernel on most machines

# Modules of our own models: FastDecoder copies their arithmetic, GraphDecoder records it.
KNOWN = (Transformer, Decoder, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)


def reach(length: int, context: int) -> int:
    """Slots of the cache that a text of `length` tokens reads: 128, 256, 512 and so on, at most the context."""
    slots = 128
    while slots < length:
        slots *= 2
    return min(slots, context)


def merged(norm: RMSNorm, *projections: nn.Linear) -> Tensor:
    """One matrix (D, all outputs) of the projections, with the norm's weight folded in; it expects `unit` vectors."""
    columns = torch.cat([projection.weight.t() for projection in projections], dim=1)
    return columns.mul_(norm.weight[:, None] * len(norm.weight) ** 0.5)


def unit(x: Tensor, least: Tensor) -> Tensor:
    """RMSNorm without its weight and the factor sqrt(size): three calls, where the fused one takes ten on a CPU.

    `least` is sqrt(size * epsilon).
    """
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)


class FastDecoder:
    """The step of a model on a CPU. Letters as in transformer.py."""

    # Widths that round as SLOTS do, by shape, vocabulary, type and threads: kernels are chosen by these, not by values.
    known_widths: ClassVar[dict[tuple[object, ...], list[int]]] = {}

    @torch.inference_mode()
    def __init__(self, model: Transformer) -> None:
        shape, decoder = model.shape, model.model
        self.shape, self.heads, self.kv_heads, self.head_dim = shape, shape.heads, shape.kv_heads, shape.head_dim
        self.embedding, self.cos, self.sin = decoder.embed_tokens.weight, decoder.cos, decoder.sin
        self.blocks, head = [], (shape.head_dim,)
        norms: list[Tensor] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            reads = merged(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gates = merged(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            writes, down = (each.weight.t().contiguous() for each in (attention.o_proj, mlp.down_proj))
            self.blocks.append((reads, writes, gates, down))
            for norm, count in ((attention.q_norm, shape.heads), (attention.k_norm, shape.kv_heads)):
                norms += [norm.weight if isinstance(norm, RMSNorm) else torch.full(head, shape.head_dim**-0.5)] * count
        self.head = merged(decoder.norm, model.lm_head)
        self.norms = torch.stack(norms).view(shape.layers, 1, -1, shape.head_dim) * shape.head_dim**0.5
        self.normed = isinstance(attention.q_norm, RMSNorm)  # Llama has no QK-norm
        eps = decoder.norm.eps
        self.least, self.least_head = (torch.tensor((n * eps) ** 0.5) for n in (shape.dim, shape.head_dim))
        left, right = self.norms.chunk(2, dim=-1)  # of (layers, 1, H + K, E)
        self.crossed = torch.cat((-right, left), dim=-1)
        self.widths = self.find_widths()

    def find_widths(self) -> list[int]:
        """Numbers of rows whose bits are those of SLOTS rows, SLOTS included, ascending; tried out once."""
        weights = self.embedding
        key = (self.shape, weights.shape, weights.dtype, self.normed, torch.get_num_threads())
        if key not in self.known_widths:
            cache = Cache(self.shape, SLOTS, reach(1, self.shape.context), weights.device, weights.dtype)
            generator = torch.Generator().manual_seed(0)
            for part in (cache.keys, cache.values):
                part.copy_(torch.randn(part.shape, generator=generator))
            tokens = [row * 7 % len(weights) for row in range(SLOTS)]
            positions = [row * 11 % len(cache.slots) for row in range(SLOTS)]
            whole = self.step(cache, tokens, positions)
            narrow = {width: self.step(cache, tokens[:width], positions[:width]) for width in WIDTHS}
            alike = [width for width, logits in narrow.items() if torch.equal(logits, whole[:width])]
            self.known_widths[key] = [*alike, SLOTS]
        return self.known_widths[key]

    @torch.inference_mode()
    def step(self, cache: Cache, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) after the next token of each of the cache's first rows, which is written at its position."""
        rows, rotated = len(tokens), self.heads + self.kv_heads
        grouped = (rows, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        at, row = torch.tensor(positions), cache.rows[:rows, 0]
        parts = self.parts(cache, positions, at)
        cos = (self.norms * self.cos[at][:, None]).unbind()  # (B, H + K, E) each
        sin = (self.crossed * self.sin[at][:, None]).unbind()
        x = self.embedding[torch.tensor(tokens)]  # (B, D)
        for layer, (reads, writes, gates, down) in enumerate(self.blocks):
            heads = (unit(x, self.least) @ reads).view(rows, -1, self.head_dim)  # (B, H + K + K, E)
            qk = unit(heads[:, :rotated], self.least_head) if self.normed else heads[:, :rotated]
            qk = torch.addcmul(qk * cos[layer], qk.roll(self.head_dim // 2, -1), sin[layer])
            keys, values = cache.keys[layer], cache.values[layer]  # (B, K, L, E)
            keys[row, :, at] = qk[:, self.heads :]
            values[row, :, at] = heads[:, rotated:]
            # Heads that share keys are passed as queries of one head.
            q, y = qk[:, : self.heads].view(grouped), None
            for used, mask, chosen in parts:
                here = F.scaled_dot_product_attention(q, keys[:rows, :, :used], values[:rows, :, :used], attn_mask=mask)
                y = here if y is None else torch.where(chosen, here, y)
            assert y is not None
            x = torch.addmm(x, y.reshape(rows, -1), writes)
            gate, up = (unit(x, self.least) @ gates).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, down)
        return unit(x, self.least) @ self.head

    def parts(self, cache: Cache, positions: list[int], at: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """For each `reach` in use: its slots, the mask (B, 1, 1, L) to add, and the rows (B, 1, 1, 1) that have it.

        Kernels sum over all slots that they are given, so that their number shows in the last bits.
        """
        reaches = [reach(position + 1, self.shape.context) for position in positions]
        found = []
        for used in sorted(set(reaches)):
            hidden = cache.slots[:used] > at[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.embedding.dtype).masked_fill_(hidden, -torch.inf)
            chosen = torch.tensor([each == used for each in reaches])
            found.append((used, mask[:, None, None], chosen[:, None, None, None]))
        return found


class GraphDecoder:
    """The model's own step over all rows of a cache, recorded once as a CUDA graph and replayed.

    One launch replaces about thirty per block. The graph always reads the whole cache; slots after a row's position are
    masked.
    """

    # Streams to record on; reused, as libraries keep a buffer per stream.
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(len(cache.rows), 1, dtype=torch.int64, device=cache.keys.device)
        self.positions = torch.zeros_like(self.tokens)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (B, V) after the next token of each row, which is written at its position; the next step overwrites
        them."""
        self.tokens.copy_(torch.tensor(tokens)[:, None])
        self.positions.copy_(torch.tensor(positions)[:, None])
        if self.graph is None:
            self.graph, self.logits = self.record()
        with torch.cuda.device(self.tokens.device):
            self.graph.replay()
        return self.logits

    def record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. Running it twice writes the same keys again."""

        def act() -> Tensor:
            self.cache.at(self.positions, len(self.cache.slots))
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
