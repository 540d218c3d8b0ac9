"""Fast decoding of one token per row: `GraphDecoder` replays a CUDA graph of the model's own step, `FastDecoder` runs
the model's arithmetic on a CPU over a copy of the weights in a layout of its own.

On a CPU the cost per token is reading the weights once plus a few torch calls per block. So matrices that read the same
vector are merged, and a norm's weight is folded into the next matrix. A row's bits must ignore its neighbours: products
see to that (`products.py`), each row reads a part of the cache that depends on its own length alone, and the number of
rows is one whose kernels round as those of 16 rows do.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.base.errors import RecipeError
from llm.inference.products import ENGINE, Int8Product, Product, unit
from llm.model.transformer import MLP, Attention, Block, Cache, Decoder, RMSNorm, Transformer

READ = 64  # tokens of one text at once
GRAIN = 1 << 15  # numbers that torch leaves to one thread
# Of a step: its first token and the one after the last, each layer's keys and values (N, K, L, E), the mask to add.
Run = tuple[int, int, Sequence[Tensor], Sequence[Tensor], Tensor]

SLOTS = 16  # rows that are decoded at once
WIDTHS = (1, 2, 4, 8)  # fewer rows, where they round alike; one alone is another kernel on most machines

# Modules of our own models: FastDecoder copies their arithmetic, GraphDecoder records it.
KNOWN = (Transformer, Decoder, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)


def reach(length: int, context: int) -> int:
    """Slots of the cache that a text of `length` tokens reads: 32, 48, 64, 96, 128 and so on, at most the context.

    These are powers of two and three quarters of them. Reading more takes time; in finer steps, fewer rows would be
    read at once.
    """
    whole = max(32, 1 << (length - 1).bit_length())
    part = whole * 3 // 4
    return min(part if whole > 32 and length <= part else whole, context)


def silu(x: Tensor) -> Tensor:
    """SiLU of x (N, ffn), of so few rows at a time that torch does not split one between threads.

    The last numbers of a thread's share, too few for a vector, go through another kernel, which rounds differently.
    """
    rows = max(1, GRAIN // x.shape[1])
    return F.silu(x) if len(x) <= rows else torch.cat([F.silu(part) for part in x.split(rows)])


def merged(norm: RMSNorm, *projections: nn.Linear) -> Tensor:
    """One matrix (all outputs, D) of the projections, with the norm's weight folded in; it expects `unit` vectors."""
    rows = torch.cat([projection.weight for projection in projections])
    return rows.mul_(norm.weight * len(norm.weight) ** 0.5)


def is_known(model: nn.Module) -> bool:
    """True for a model of ours, whole: a sharded one, which has `unshard`, gathers weights in its own forward only."""
    return all(type(module) in KNOWN for module in model.modules()) and not hasattr(model, "unshard")


def prepare_weights(model: Transformer, *, int8: bool = False) -> None:
    """Lay out, once and for all, the weights of a model that will not change; `int8`: round them to 8 bits.

    Does nothing without `int8` where FastDecoder has no part. RecipeError where int8 is not to be had.
    """
    device = model.lm_head.weight.device.type
    fits = is_known(model) and device == "cpu" and model.lm_head.weight.dtype == torch.float32
    if int8 and not (fits and ENGINE in torch.backends.quantized.supported_engines):
        raise RecipeError(f"--int8 is for a model of ours on an x86-64 CPU; this one is on {device}: leave it out")
    if fits and not (model in PREPARED and PREPARED[model].int8 == int8):
        PREPARED[model] = FastDecoder(model, int8=int8)


class FastDecoder:
    """The step of a model on a CPU. Letters as in transformer.py; N tokens of a step, of several texts or one."""

    # Widths that round as SLOTS do, by shape, vocabulary, type and threads: kernels are chosen by these, not by values.
    known_widths: ClassVar[dict[tuple[object, ...], list[int]]] = {}

    @torch.inference_mode()
    def __init__(self, model: Transformer, *, int8: bool = False) -> None:
        shape, decoder = model.shape, model.model
        self.shape, self.heads, self.kv_heads, self.head_dim = shape, shape.heads, shape.kv_heads, shape.head_dim
        self.embedding, self.cos, self.sin = decoder.embed_tokens.weight, decoder.cos, decoder.sin
        self.int8, self.blocks, head = int8, [], (shape.head_dim,)
        product = Int8Product if int8 else Product
        norms: list[Tensor] = []
        for block in decoder.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            reads = merged(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gates = merged(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            matrices = (reads, attention.o_proj.weight, gates, mlp.down_proj.weight)
            self.blocks.append([product(weight) for weight in matrices])
            for norm, count in ((attention.q_norm, shape.heads), (attention.k_norm, shape.kv_heads)):
                norms += [norm.weight if isinstance(norm, RMSNorm) else torch.full(head, shape.head_dim**-0.5)] * count
        self.head = product(merged(decoder.norm, model.lm_head))
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
        key = (self.shape, weights.shape, weights.dtype, self.normed, self.int8, torch.get_num_threads())
        if key not in self.known_widths:
            # Long enough for rows that read different parts of it.
            cache = Cache(self.shape, SLOTS, reach(128, self.shape.context), weights.device, weights.dtype)
            cache.both.copy_(torch.randn(cache.both.shape, generator=torch.Generator().manual_seed(0)))
            tokens = [row * 7 % len(weights) for row in range(SLOTS)]
            positions = [row * 11 % len(cache.slots) for row in range(SLOTS)]
            whole = self.step(cache, tokens, positions)
            narrow = {width: self.step(cache, tokens[:width], positions[:width]) for width in WIDTHS}
            alike = [width for width, logits in narrow.items() if torch.equal(logits, whole[:width])]
            self.known_widths[key] = [*alike, SLOTS]
        return self.known_widths[key]

    @torch.inference_mode()
    def step(
        self,
        cache: Cache,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, V) after each of `tokens`, which is written into the cache at its position of its row.

        By default these are the first rows, one token each. Several tokens of one row stand together, and see those
        before them. `wanted` are the places among `tokens` after which alone there are logits.
        """
        count, rotated = len(tokens), self.heads + self.kv_heads
        grouped = (count, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        rows = range(count) if rows is None else rows
        at, row = torch.tensor(positions), torch.tensor(rows)
        runs = self.runs(cache, rows, positions, at)
        targets = _targets(cache, rows, positions)
        cos = (self.norms * self.cos[at][:, None]).unbind()  # (N, H + K, E) each
        sin = (self.crossed * self.sin[at][:, None]).unbind()
        x = self.embedding[torch.tensor(tokens)]  # (N, D)
        for layer, (reads, writes, gates, down) in enumerate(self.blocks):
            heads = reads.of_unit(x, self.least).view(count, -1, self.head_dim)  # (N, H + K + K, E)
            qk = heads[:, :rotated]
            units = unit(qk, self.least_head) if self.normed else qk
            half = units.roll(self.head_dim // 2, -1)
            torch.addcmul(units * cos[layer], half, sin[layer], out=qk)
            written = heads[:, self.heads :].view(count, 2, self.kv_heads, self.head_dim)
            if targets is not None:
                targets[layer].copy_(written)
            else:
                cache.both[:, layer][:, row, :, at] = written
            # Heads that share keys are passed as queries of one head.
            q = qk[:, : self.heads].view(grouped)
            y = [F.scaled_dot_product_attention(q[a:b], k[layer], v[layer], attn_mask=m) for a, b, k, v, m in runs]
            x = writes.added(x, (y[0] if len(y) == 1 else torch.cat(y)).reshape(count, -1))
            gate, up = gates.of_unit(x, self.least).chunk(2, dim=-1)
            x = down.added(x, silu(gate).mul_(up))
        return self.head.of_unit(x if wanted is None else x[wanted], self.least)

    @torch.inference_mode()
    def read(self, text: Sequence[int]) -> Tensor:
        """Logits (T, V) after each token of a text, by the arithmetic of single steps."""
        cache = Cache(self.shape, 1, reach(len(text), self.shape.context), self.cos.device, self.embedding.dtype)
        parts = [range(low, min(low + READ, len(text))) for low in range(0, len(text), READ)]
        return torch.cat([self.step(cache, text[a.start : a.stop], a, [0] * len(a)) for a in parts])

    def runs(self, cache: Cache, rows: Sequence[int], positions: Sequence[int], at: Tensor) -> list[Run]:
        """Parts of the tokens that attention takes at once: of one `reach`, in rows that follow each other or in one.

        Kernels sum over all slots that they are given, so that their number shows in the last bits.
        """
        used = [reach(position + 1, self.shape.context) for position in positions]
        several = {row for row, following in pairwise(rows) if row == following}  # a row's tokens stand together

        def kind(i: int) -> tuple[int, bool, int]:
            """A token's reach, and its row, or else by how much its row is ahead of its place."""
            return used[i], rows[i] in several, rows[i] if rows[i] in several else rows[i] - i

        found = []
        for (slots, is_one, _), group in groupby(range(len(rows)), kind):
            part = list(group)
            a, b, row = part[0], part[-1] + 1, rows[part[0]]
            here = cache.both[:, :, row : row + (1 if is_one else b - a), :, :slots]
            keys, values = here.expand(-1, -1, b - a, -1, -1, -1)
            hidden = cache.slots[:slots] > at[a:b, None]
            mask = torch.zeros(hidden.shape, dtype=self.embedding.dtype).masked_fill_(hidden, -torch.inf)
            found.append((a, b, keys.unbind(), values.unbind(), mask[:, None, None]))
        return found


def _targets(cache: Cache, rows: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Where keys and values go, (N, 2, K, E) of each layer, if that is a slice of the cache.

    It is one for the same position of rows that follow each other, and for such positions of one row.
    """
    row, at, count = rows[0], positions[0], len(rows)
    if list(rows) == [*range(row, row + count)] and len(set(positions)) == 1:
        return cache.both[:, :, row : row + count, :, at].permute(1, 2, 0, 3, 4).unbind()
    if len(set(rows)) == 1 and list(positions) == [*range(at, at + count)]:
        return cache.both[:, :, row, :, at : at + count].permute(1, 3, 0, 2, 4).unbind()
    return None


PREPARED: WeakKeyDictionary[Transformer, FastDecoder] = WeakKeyDictionary()


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
