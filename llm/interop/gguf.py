"""A run as one GGUF file for llama.cpp, with a Modelfile for Ollama: the same ids, BOS and spaces as here.

The only module that imports gguf. llama.cpp's "llama" vocabulary joins pieces by score, as sentencepiece's BPE does, so
only scores, byte pieces and symbols are carried over. Its "qwen3" model is our architecture, rotary halves included.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError, optional
from llm.data.chat_template import END, GO, PLAIN_JINJA, OwnTemplate
from llm.data.tokenizer import CONTROLS, SPACE, Tokenizer
from llm.inference.sampling import Sampling
from llm.interop import folder_export
from llm.interop.parity import check_llama_cpp, overlaps, symbols_of
from llm.run_folder.loaded_run import LoadedRun
from llm.run_folder.model_card import FILE_NAME

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of pieces
# The largest rounding error of each storage type: relative to the largest number of the tensor, and absolute.
ROUNDING = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0), "Q8_0": (1 / 220, 2.0**-18)}
NEEDED = "--gguf needs the package gguf: pip install -e '.[export]'"
MODELFILE = """# ollama create {name} -f Modelfile
FROM ./{file}
{template}
{parameters}
"""


def write(folder: Path, opened: LoadedRun, kind: str) -> None:
    """Write RUN-KIND.gguf, Modelfile and the model card to `folder`."""
    library, tokenizer = optional("gguf", NEEDED), opened.tokenizer
    if not tokenizer.is_exact_bpe or json.loads(_small_file(opened, "config.json"))["model_type"] != "qwen3":
        raise RecipeError("--gguf is for models with a vocabulary of our own, byte-fallback BPE: export a folder")
    if texts := overlaps(symbols_of(tokenizer)):  # llama.cpp takes the longest first, all others the leftmost
        raise RefusedError(f"llama.cpp would split {texts[0]!r} another way, as two of tokenizer.terms overlap in it")
    path = file_of(folder, opened, kind)
    writer = library.GGUFWriter(path, "qwen3")
    for add, value in settings(opened).items():
        getattr(writer, f"add_{add}")(value)
    for name, tensor in opened.model.named_parameters():
        data = tensor.detach().numpy()
        stored = stored_as(library, kind, data.shape)
        writer.add_tensor(name_of(name), library.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    template = f'TEMPLATE """{GO}"""\nPARAMETER stop "{END}"' if opened.is_chat else "TEMPLATE {{ .Prompt }}"
    atomic_io.write_at(path, [])  # flushes the file to the disk
    name, context = opened.folder.name.lower(), opened.model.shape.context
    # The penalty is for all tokens that occurred; Ollama's own default is the last 64.
    values = {**asdict(Sampling()), "repeat_last_n": -1, "num_ctx": context}
    lines = [f"PARAMETER {key.replace('repetition', 'repeat')} {value:.9g}" for key, value in values.items()]
    modelfile = MODELFILE.format(name=name, file=path.name, template=template, parameters="\n".join(lines))
    atomic_io.write_bytes(folder / "Modelfile", modelfile.encode())
    if FILE_NAME in opened.checkpoint.manifest.get("files", ()):  # checkpoints of an earlier version have none
        atomic_io.write_bytes(folder / FILE_NAME, folder_export.card(opened))


def check(folder: Path, opened: LoadedRun, kind: str) -> Iterator[str]:
    """Lines on what agrees between the run and the file, read again by gguf and, if installed, by llama.cpp."""
    library, path = optional("gguf", NEEDED), file_of(folder, opened, kind)
    found = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    wanted = {name_of(name): p.detach() for name, p in opened.model.named_parameters()}
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise RefusedError(f"the tensors of {path.name} and the run differ, first in {odd[0]}")
    for name, tensor in wanted.items():
        read = torch.from_numpy(library.quants.dequantize(found[name].data, found[name].tensor_type).copy())
        relative, least = ROUNDING[found[name].tensor_type.name]
        most = tensor.abs().max() * relative + least
        if read.shape != tensor.shape or (read - tensor).abs().max() > most:
            raise RefusedError(f"{name} of {path.name} is not the run's")
    stored = sorted({tensor.tensor_type.name.lower() for tensor in found.values()})
    yield f"gguf: {len(found)} tensors as {', '.join(stored)}, each the run's within its rounding"
    yield from check_llama_cpp(path, opened.model, opened.tokenizer, kind, opened.is_chat)


def file_of(folder: Path, opened: LoadedRun, kind: str) -> Path:
    return folder / f"{opened.folder.name}-{kind}.gguf"


def name_of(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def stored_as(library: Any, kind: str, shape: tuple[int, ...]) -> Any:
    """gguf's type for a tensor: f32 for vectors (llama.cpp requires it), f16 where rows do not fill q8_0's blocks."""
    if len(shape) == 1:
        kind = "f32"
    elif kind == "q8_0" and shape[-1] % 32:
        kind = "f16"
    return library.GGMLQuantizationType[kind.upper()]


def settings(opened: LoadedRun) -> dict[str, Any]:
    """The metadata of the model and its vocabulary, by gguf's names."""
    shape, tokenizer = opened.model.shape, opened.tokenizer
    config = json.loads(_small_file(opened, "config.json"))
    tokens, scores, types = vocabulary(tokenizer)
    chat = {}
    if opened.is_chat:
        if not {name.encode() for name in CONTROLS} <= set(tokens):
            raise RefusedError("pieces of this vocabulary join to the name of a turn marker, which llama.cpp would do")
        end = OwnTemplate(tokenizer).end
        chat = {"chat_template": PLAIN_JINJA, "eot_token_id": end, "eos_token_id": end}
    return {
        "name": opened.folder.name, "context_length": shape.context, "embedding_length": shape.dim,
        "block_count": shape.layers, "feed_forward_length": shape.ffn_dim,
        "head_count": shape.heads, "head_count_kv": shape.kv_heads,
        "key_length": shape.head_dim, "value_length": shape.head_dim, "rope_dimension_count": shape.head_dim,
        "rope_freq_base": config["rope_theta"], "layer_norm_rms_eps": config["rms_norm_eps"],
        "vocab_size": tokenizer.vocab_size, "tokenizer_model": "llama", "tokenizer_pre": "default",
        "token_list": tokens, "token_scores": scores, "token_types": types,
        "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.bos,  # a document ends where the next begins
        "unk_token_id": tokenizer.unknown, "add_bos_token": True, "add_eos_token": False,
        "add_space_prefix": False, "remove_extra_whitespaces": False, **chat,
    }  # fmt: skip


def vocabulary(tokenizer: Tokenizer) -> tuple[list[bytes], list[float], list[int]]:
    """Name, score and type of each piece. Symbols, which match the raw text, are named with plain spaces."""
    ids = range(tokenizer.vocab_size)
    names = [tokenizer.piece(id) for id in ids]
    pieces = set(names[tokenizer.first_piece :])
    types = [NORMAL if id >= tokenizer.first_piece else BYTE for id in ids]
    for id in tokenizer.symbols:
        names[id], types[id] = names[id].replace(SPACE, " "), USER_DEFINED
    for id, kind in ((tokenizer.unknown, UNKNOWN), *((id, CONTROL) for id in tokenizer.controls)):
        types[id] = kind
        # llama.cpp would merge pieces that join to this name into the special piece itself.
        while any({names[id][:cut], names[id][cut:]} <= pieces for cut in range(1, len(names[id]))):
            names[id] = f"<{names[id]}>"
    scores = [float(tokenizer.first_piece - id) if id >= tokenizer.first_piece else 0.0 for id in ids]
    return [name.encode() for name in names], scores, types


def _small_file(opened: LoadedRun, name: str) -> bytes:
    return (opened.checkpoint.folder / name).read_bytes()
