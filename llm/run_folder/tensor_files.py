"""safetensors files whose tensors are sharded over processes: each process writes and reads its own rows."""

import itertools
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.base import atomic_io
from llm.base.errors import RefusedError
from llm.distributed.sharding import LocalShard

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def header(tensors: dict[str, LocalShard]) -> tuple[bytes, dict[str, int], int]:
    """Head of a safetensors file with the tensors sorted by name, the offset of each, and the length of the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shard in sorted(tensors.items()):
        begin, end = end, end + math.prod(shard.shape) * shard.local.element_size()
        header[name] = {"dtype": DTYPES[shard.local.dtype], "shape": list(shard.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    offsets = {name: len(head) + header[name]["data_offsets"][0] for name in tensors}
    return head, offsets, len(head) + end


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file of whole tensors, durably."""
    head, _, _ = header({name: LocalShard(tensor, tuple(tensor.shape), 0) for name, tensor in tensors.items()})
    atomic_io.write_chunks(path, itertools.chain([head], (as_bytes(tensors[name]) for name in sorted(tensors))))


def own_rows(tensors: dict[str, LocalShard], offsets: dict[str, int]) -> Iterator[tuple[int, memoryview]]:
    """The rows that this process holds of each tensor, with their offset in the file."""
    for name, shard in sorted(tensors.items()):
        if shard.local.numel():
            row_bytes = math.prod(shard.shape[1:]) * shard.local.element_size()
            yield offsets[name] + shard.low * row_bytes, as_bytes(shard.local)


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file `path`. RefusedError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"{path} cannot be read: {error}") from error


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file."""
    with _opened(path) as file:
        return set(file.keys())


def load_tensors(path: Path, into: dict[str, LocalShard], *, allow_extra: bool = False) -> None:
    """Copy this process's rows of a safetensors file into the shards of the same names, for any number of processes.

    RefusedError unless shapes and names agree; with `allow_extra`, the file may hold further tensors.
    """
    with _opened(path) as file, torch.no_grad():
        names = set(file.keys())
        if names != into.keys() and not (allow_extra and into.keys() <= names):
            odd = sorted(names ^ into.keys())[0]
            fault = f"{path} and the model of this recipe hold different tensors, {odd} is only in one of them"
            raise RefusedError(f"{fault}: take the model's keys from the recipe that it was trained with")
        for name, shard in into.items():
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shard.shape:
                raise RefusedError(f"{path}: {name} is {stored.get_shape()}, the model's is {list(shard.shape)}")
            if shard.local.numel():
                rows = stored[shard.low : shard.low + len(shard.local)] if shard.shape else file.get_tensor(name)
                shard.local.copy_(rows)
