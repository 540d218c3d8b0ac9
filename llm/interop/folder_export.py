"""A clean Hugging Face model folder of a run: its weights as fp32 or bf16, card, configuration and tokenizer."""

import json
from pathlib import Path

import torch
from torch import Tensor

from llm.base import atomic_io
from llm.run_folder import checkpoint, model_card, tensor_files
from llm.run_folder.loaded_run import LoadedRun

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_folder(folder: Path, opened: LoadedRun, kind: str, shard: int) -> None:
    """Write the weights in files of at most `shard` bytes, and the small files of the checkpoint."""
    for name, data in small_files(opened, kind).items():
        atomic_io.write_bytes(folder / name, data)
    parts = _parts(tensors(opened, kind), shard)
    if len(parts) == 1:
        tensor_files.write_tensors(folder / checkpoint.WEIGHTS, parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensor_files.write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(each.nbytes for part in parts for each in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_io.write_json(folder / "model.safetensors.index.json", index)


def tensors(opened: LoadedRun, kind: str) -> dict[str, Tensor]:
    """The weights by name, as `kind`; tied ones once."""
    return {name: p.detach().to(DTYPES[kind]) for name, p in opened.model.named_parameters()}


def small_files(opened: LoadedRun, kind: str) -> dict[str, bytes]:
    """Card, configuration and tokenizer of the checkpoint, by name."""
    names = [name for name in opened.checkpoint.manifest["files"] if not name.endswith(".safetensors")]
    files = {name: (opened.checkpoint.folder / name).read_bytes() for name in names}
    if model_card.FILE_NAME in files:  # checkpoints of an earlier version have none
        files[model_card.FILE_NAME] = card(opened)
    dtype = str(DTYPES[kind]).removeprefix("torch.")
    return files | {"config.json": atomic_io.as_json(json.loads(files["config.json"]) | {"torch_dtype": dtype})}


def card(opened: LoadedRun) -> bytes:
    """The model card of the checkpoint; that of a mean says so."""
    found = (opened.checkpoint.folder / model_card.FILE_NAME).read_bytes()
    if not opened.others:
        return found
    told = f"The weights are {opened.name}. The table and the curve are of the first of them alone.\n\n| | |\n"
    return found.replace(b"| | |\n", told.encode(), 1)


def _parts(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in the order of their names, split into parts of at most `most` bytes or one tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        size += tensor.nbytes
        if parts[-1] and size > most:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    return parts
