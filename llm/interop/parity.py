"""Hold what was written for others against the model it was made of, with their own library: ids, logits, settings.

The only module that imports transformers and llama_cpp. RefusedError names the first thing in which they differ.
"""

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.base.errors import RecipeError, RefusedError
from llm.data.tokenizer import SPACE, Tokenizer
from llm.distributed.threads import cores
from llm.inference.generation import Sampling, generate
from llm.model.transformer import Transformer

TEXTS = 1000  # tough ones, whose ids are compared
PROBE = 256  # tokens at most, after each of which logits are compared
# Largest mean divergence (nats a token) from the model in fp32 that rounding may bring about.
MOST_DIVERGENCE = {"fp32": 0.0, "f32": 1e-8, "f16": 1e-4, "bf16": 5e-3, "q8_0": 2e-2}
SCRIPTS = (
    "abcXYZ",
    "éßŁø",
    "αβγΩ",
    "привет",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "ไทย",
    "漢字かな",
    "한국어",
    "𝔘𐍈",
    "e\u0301\u0323",
    "½Å℃",
)
ODD = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\x00",
        "\x07\x1b",
        "\x7f",
        "\u00a0",
        "\u200b",
        "\u2028",
        "\ufeff",
        "\ufffd",
        SPACE,
    ),
    *("🎉", "👩‍👩‍👧", "🇩🇪", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "▂", "_", "1234567", "..."),
)
LONG = ("", " ", "\n", "a" * 3_000, " " * 2_000, "\n" * 2_000, "ab" * 1_000, "<s>" * 300)


def tough_texts(tokenizer: Tokenizer, count: int = TEXTS, seed: int = 4) -> list[str]:
    """Runs, then mixtures of pieces, scripts, spaces, controls and marks, drawn from a seed."""
    draw = random.Random(seed)
    pieces = [tokenizer.bytes_of(id).decode(errors="ignore") for id in range(tokenizer.vocabulary)]
    symbols = symbols_of(tokenizer)
    pieces = [piece for piece in pieces if piece]
    texts = [*LONG, *symbols, *(f" {symbol}x{symbol}\n" for symbol in symbols), *overlaps(symbols)]
    for _ in range(count - len(texts)):
        parts = []
        for _ in range(draw.randint(0, 12)):
            kind = draw.random()
            if kind < 0.4:
                parts.append(draw.choice(pieces))
            elif kind < 0.6:
                parts.append("".join(draw.choices(draw.choice(SCRIPTS), k=draw.randint(1, 8))))
            elif kind < 0.9:
                parts.append(draw.choice((*ODD, *symbols)) * draw.choice((1, 1, 1, 2, 7)))
            else:
                parts.append(chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))))
        texts.append(draw.choice(("", " ")).join(parts))
    return texts


def symbols_of(tokenizer: Tokenizer) -> list[str]:
    """What is split off before pieces are joined: the newline and the terms of the recipe."""
    return [tokenizer.bytes_of(id).decode() for id in tokenizer.symbols]


def overlaps(symbols: list[str]) -> list[str]:
    """Texts in which the end of one symbol is the beginning of another: whose it is depends on who looks."""
    pairs = ((a, b) for a in symbols for b in symbols if a != b)
    cuts = ((a, b, cut) for a, b in pairs for cut in range(1, min(len(a), len(b))))
    return [a + b[cut:] for a, b, cut in cuts if a.endswith(b[:cut])]


@torch.no_grad()
def probe(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """Tokens whose logits are compared: (2, T), a row drawn at random and one that the model says itself."""
    length = min(PROBE, model.shape.context)
    drawn = torch.randint(tokenizer.vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    said = [row[0] for row in generate(model, [[tokenizer.bos]], length - 1, Sampling(temperature=1.0, min_p=0.0))]
    return torch.stack([drawn, torch.tensor([tokenizer.bos, *said])])


def divergence(reference: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence (nats) of `found` logits (..., V), and the share of equal first choices."""
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item(), (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def bounded(kind: str, reference: Tensor, found: Tensor) -> str:
    """What rounding to `kind` has cost, as a line. RefusedError where that is more than its bound."""
    nats, agreement = divergence(reference, found)
    if not nats <= MOST_DIVERGENCE[kind]:
        raise RefusedError(
            f"{kind} diverges by {nats:.2g} nats a token from the run, {MOST_DIVERGENCE[kind]:g} at most"
        )
    return (
        f"{nats:.2g} nats a token from fp32 (at most {MOST_DIVERGENCE[kind]:g}), first choice equal in {agreement:.1%}"
    )


def check_folder(folder: Path, model: Transformer, tokenizer: Tokenizer, kind: str) -> Iterator[str]:
    """Lines on what agrees between `model`, in fp32, and what transformers makes of `folder`, written as `kind`."""
    library = _transformers()
    with _quiet():
        theirs, told = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        odd = {what: names for what, names in told.items() if names}
        if odd:
            what, names = next(iter(odd.items()))
            raise RefusedError(f"transformers finds {what.replace('_', ' ')}: {sorted(map(str, names))[0]}")
        yield f"transformers {library.__version__}: {type(theirs).__name__}, every tensor in its place"
        _same_settings(theirs, model, tokenizer)
        if tokenizer.is_portable:
            yield _same_ids(library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False), tokenizer)
        tokens = probe(model, tokenizer)
        with torch.no_grad():
            reference, found = model.logits(tokens), theirs.eval()(tokens).logits
            if kind != "fp32":
                line = bounded(kind, reference, found)
                reference = _rounded(model, torch.bfloat16).logits(tokens)
        if not torch.equal(reference, found):
            apart = (reference - found).abs().max().item()
            raise RefusedError(f"the logits differ from the run's, by up to {apart:.2g}")
        same = "the run's" if kind == "fp32" else "those of the run's weights rounded to bf16"
        yield f"logits: {found.shape[0] * found.shape[1]} rows equal to {same}, to the bit in fp32"
        if kind != "fp32":
            yield f"{kind}: {line}"


def check_llama_cpp(path: Path, model: Transformer, tokenizer: Tokenizer, kind: str) -> Iterator[str]:
    """The same of llama.cpp and a GGUF file; one line that says so where llama_cpp is not installed."""
    try:
        import llama_cpp
    except ImportError:
        yield "llama.cpp: not held against it, as llama-cpp-python is not installed"
        return
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    tokens = probe(model, tokenizer)
    # Keys and values are kept in fp32 (type 0), so that only the weights are rounded.
    theirs = llama_cpp.Llama(
        str(path), n_ctx=tokens.shape[1], n_batch=tokens.shape[1], logits_all=True, type_k=0, type_v=0, verbose=False
    )
    with closing(theirs):
        yield f"llama.cpp ({llama_cpp.__version__}): {_same_llama_ids(theirs, tokenizer)}"
        found = []
        for row in tokens.tolist():
            theirs.reset()
            theirs.eval(row)
            found.append(torch.tensor(theirs.scores[: len(row)]))
        with torch.no_grad():
            yield f"{kind}: {bounded(kind, model.logits(tokens), torch.stack(found))}"


@cache
def _silence(llama_cpp: Any) -> Any:
    """What takes llama.cpp's messages and says nothing; it must live as long as the library."""
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _same_llama_ids(theirs: Any, tokenizer: Tokenizer) -> str:
    """RefusedError unless they agree, on texts without a literal U+2581, which llama.cpp takes for a space."""
    texts = [text.replace(SPACE, "x") for text in tough_texts(tokenizer)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=cores()), strict=True):
        found = theirs.tokenize(text.encode(), add_bos=True, special=False)
        if found != [tokenizer.bos, *ids.tolist()]:
            raise RefusedError(f"llama.cpp's ids of {text[:40]!r} are {found[:8]}, the run has {ids[:7].tolist()}")
        if theirs.detokenize(found[1:]) != text.encode():
            raise RefusedError(f"llama.cpp's ids of {text[:40]!r} do not come back as that text")
    return f"ids of {len(texts):,} tough texts equal, and back again; a literal U+2581 is a space to it"


def _same_settings(theirs: Any, model: Transformer, tokenizer: Tokenizer) -> None:
    """RefusedError unless a text begins and ends there as here, and what is never said here is never said there."""
    for name, wanted, found in (
        ("bos_token_id", tokenizer.bos, theirs.config.bos_token_id),
        ("generation's eos_token_id", list(tokenizer.ends), _listed(theirs.generation_config.eos_token_id)),
        ("suppress_tokens", list(tokenizer.banned), list(theirs.generation_config.suppress_tokens or [])),
        ("vocab_size", tokenizer.vocabulary, theirs.config.vocab_size),
        ("tie_word_embeddings", model.shape.tied, theirs.config.tie_word_embeddings),
    ):
        if found != wanted:
            raise RefusedError(f"{name} is {found}, the run has {wanted}")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _same_ids(theirs: Any, tokenizer: Tokenizer) -> str:
    texts, ours = tough_texts(tokenizer), tokenizer.is_exact_bpe
    encoded = tokenizer.encode_batch(texts, threads=cores())
    begin = [tokenizer.bos] if ours else []  # whether a borrowed tokenizer adds it is its own affair
    for text, ids, found in zip(texts, encoded, theirs(texts, add_special_tokens=ours)["input_ids"], strict=True):
        if found != [*begin, *ids.tolist()]:
            raise RefusedError(
                f"the ids of {text[:40]!r} are {found[:8]}, the run has {[tokenizer.bos, *ids[:7].tolist()]}"
            )
        if ours and theirs.decode(found, skip_special_tokens=True) != text:
            raise RefusedError(f"the ids of {text[:40]!r} do not come back as that text")
    return f"ids: {len(texts):,} tough texts equal{', and back again' if ours else ''}"


def _rounded(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of the model whose weights are rounded to `dtype`."""
    copy = Transformer(model.shape, model.lm_head.weight.shape[0], family=model.family).eval()
    copy.load_state_dict({name: p.to(dtype).float() for name, p in model.state_dict().items()})
    return copy


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise RecipeError("what was exported is checked with transformers: pip install -e '.[export]'") from None
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without their progress bars and advice on stderr: what goes wrong is raised."""
    settings = _transformers().logging
    level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity(logging.CRITICAL)
    if bars:
        settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.set_verbosity(level)
        if bars:
            settings.enable_progress_bar()
