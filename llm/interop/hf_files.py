"""The JSON files that make a checkpoint a Hugging Face model folder, written without their library.

The architecture is Qwen3's, which equals ours, or Llama's for weights of that family. Our tokenizer is written as
byte-fallback BPE, which gives sentencepiece's ids on any text. Its pieces hold plain spaces, so a literal U+2581 is no
piece and becomes bytes there as here. A borrowed tokenizer is copied, and transformers told to read it as it is.
"""

import json
from dataclasses import asdict
from typing import Any

from llm.base.atomic_io import as_json
from llm.config.schema import Model
from llm.data.chat_template import JINJA, template_of
from llm.data.hf_tokenizer import EXTRA_FILES, HFTokenizer
from llm.data.tokenizer import SPACE, Tokenizer
from llm.inference.sampling import Sampling
from llm.model.hf_config import FAMILIES
from llm.model.transformer import Family

# For generation in batches: transformers pads on the right, and 4 adds token_type_ids, which our models do not take.
BATCHES = {"model_input_names": ["input_ids", "attention_mask"], "padding_side": "left"}


def model_files(shape: Model, tokenizer: Tokenizer, family: Family, *, chat: bool = False) -> dict[str, bytes]:
    """config.json and generation_config.json of a resolved shape, by name; `chat`: trained on conversations."""
    template = template_of(tokenizer) if chat else tokenizer
    # A document ends where the next begins, and at the end tokens of the original model; an answer with its turn.
    end = tokenizer.bos if template.ends == (tokenizer.bos,) else list(template.ends)
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": end}
    config = {
        "architectures": [FAMILIES[family.name]],
        "model_type": family.name,
        "vocab_size": tokenizer.vocab_size, "hidden_size": shape.dim, "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "max_position_embeddings": max(family.positions, shape.context),
        "hidden_act": "silu", "rms_norm_eps": family.norm_eps, "rope_theta": family.rope_theta,
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
        **({"use_sliding_window": False} if family.name == "qwen3" else {"mlp_bias": False}),
        "use_cache": True, "torch_dtype": "float32", **ends,
    }  # fmt: skip
    generation: dict[str, Any] = {**ends, "do_sample": True, **asdict(Sampling())}
    if template.banned:
        generation["suppress_tokens"] = list(template.banned)
    return {"config.json": as_json(config), "generation_config.json": as_json(generation)}


def tokenizer_files(tokenizer: Tokenizer, *, chat: bool = False) -> dict[str, bytes]:
    """tokenizer.json and its settings, by name; none for a vocabulary that is not byte-fallback BPE.

    Where the model was trained on conversations, transformers must know the markers that its chat template writes,
    and so takes "<|user|>" in a message for one too: it renders to text first. Elsewhere no text is a marker.
    """
    if isinstance(tokenizer, HFTokenizer):
        # Some of its classes, as Llama's, replace the rules by which tokenizer.json splits a text with their own.
        about = BATCHES | json.loads(tokenizer.files.get(EXTRA_FILES[0], b"{}"))
        about["tokenizer_class"] = "PreTrainedTokenizerFast"
        return tokenizer.files | {EXTRA_FILES[0]: json.dumps(about, indent=1).encode()}
    if not tokenizer.is_exact_bpe:
        return {}
    names = [tokenizer.piece(id).replace(SPACE, " ") for id in range(tokenizer.vocab_size)]
    vocabulary = {name: id for id, name in enumerate(names)}
    bos, unknown = names[tokenizer.bos], names[tokenizer.unknown]
    symbols = [_added(id, names[id], special=False) for id in tokenizer.symbols]
    special = [_added(id, names[id], special=True) for id in (tokenizer.unknown, *tokenizer.controls)]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted([*special, *symbols], key=lambda each: each["id"]),
        "normalizer": None, "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"SpecialToken": {"id": bos, "type_id": 1}}, pair],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": _merges(tokenizer, vocabulary),
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos, "eos_token": bos, "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not chat,  # the text "<s>" means these three characters
        **BATCHES,
        "model_max_length": 1_000_000_000,
    }  # fmt: skip
    files = {"tokenizer.json": as_json(whole)}
    if chat:
        config["chat_template"] = JINJA
        files["chat_template.jinja"] = JINJA.encode()
    return {**files, "tokenizer_config.json": as_json(config)}


def _merges(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> list[list[str]]:
    """Every pair of pieces that joins to a piece, in the order in which sentencepiece would join them."""
    pieces = {piece: id for piece, id in vocabulary.items() if id >= tokenizer.first_piece}  # by id, which is by rank
    merges = []
    for piece in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(left, right) for left, right in halves if left in pieces and right in pieces]
        merges += [list(pair) for pair in sorted(found, key=lambda pair: [pieces[half] for half in pair])]
    return merges


def _added(id: int, content: str, *, special: bool) -> dict[str, Any]:
    strict = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **strict, "special": special}
