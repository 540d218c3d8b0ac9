"""python -m llm.export [RUN]: a folder for the hub or a GGUF file, held against the run before it bears its name."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError, run

if TYPE_CHECKING:
    from torch import Tensor

    from llm.run_folder.loaded_run import LoadedRun

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
GGUF = ("f32", "f16", "bf16", "q8_0")
SHARD = 4 << 30  # bytes of a file of weights


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.export",
        description="Write a run's model for others, read it again with their library, and keep it only if it says "
        "the same: equal ids, logits equal to the bit in fp32, within a stated bound elsewhere.",
    )
    parser.add_argument(
        "run", nargs="?", help="name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="default: exports/RUN, with what is not fp32 in its name"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
    parser.add_argument(
        "--shard", type=int, default=SHARD, metavar="BYTES", help="of a file of weights (default 4 GiB)"
    )
    parser.add_argument("--gguf", choices=GGUF, help="instead a file for llama.cpp and Ollama, of this type")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="then send it to the hub, with the token of `hf auth login`"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository of the hub public, not private")
    given = parser.parse_args()
    if given.push and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", given.push):
        raise RecipeError(f"--push = {given.push[:80]!r}: OWNER/NAME is expected")
    if given.shard < 1:
        raise RecipeError(f"--shard = {given.shard}: at least 1 byte is expected")
    return given


def main() -> None:
    given = arguments()
    import torch

    from llm.run_folder.loaded_run import find, open_run

    kind = given.gguf or given.dtype
    suffix = f"-gguf-{kind}" if given.gguf else "" if kind == "fp32" else f"-{kind}"
    target = given.to or Path("exports") / f"{find(given.run)[0].name}{suffix}"
    if target.exists():
        raise RecipeError(f"{target} is there already: remove it, or name another folder by --to")
    opened = open_run(given.run, torch.device("cpu"))
    try:
        with atomic_io.draft_folder(target) as draft:
            if given.gguf:
                from llm.interop.gguf import check, write

                write(draft, opened, kind)
                lines = check(draft, opened, kind)
            else:
                from llm.interop.parity import check_folder

                write_folder(draft, opened, kind, given.shard)
                lines = check_folder(draft, opened.model, opened.tokenizer, kind)
            for line in lines:
                print(line)
    except RefusedError as error:
        raise RefusedError(
            f"the export of {opened.name} is not what the run is: {error}; {target} was not left"
        ) from error
    print(
        f"{opened.name} lies in {target}, {kind}, {sum(each.stat().st_size for each in target.iterdir()) / 1e6:,.1f} MB"
    )
    if given.push:
        print(push(target, given.push, private=not given.public))


def write_folder(folder: Path, opened: "LoadedRun", kind: str, shard: int) -> None:
    """A clean model folder: weights in files of at most `shard` bytes, and what lies beside them in a checkpoint."""
    from llm.run_folder.checkpoint import write_tensors

    for name, data in files_beside(opened, kind).items():
        atomic_io.write_bytes(folder / name, data)
    parts = _parts(tensors(opened, kind), shard)
    if len(parts) == 1:
        write_tensors(folder / "model.safetensors", parts[0])
        return
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, part)
        places |= dict.fromkeys(part, name)
    total = sum(each.numel() * each.element_size() for part in parts for each in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    atomic_io.write_json(folder / "model.safetensors.index.json", index)


def tensors(opened: "LoadedRun", kind: str) -> "dict[str, Tensor]":
    """The weights by name, as `kind`; tied ones once."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    return {name: p.detach().to(dtype) for name, p in opened.model.named_parameters()}


def files_beside(opened: "LoadedRun", kind: str) -> dict[str, bytes]:
    """The small files of the checkpoint: card, configuration, tokenizer."""
    source = opened.checkpoint.folder
    names = [name for name in opened.checkpoint.manifest["files"] if not name.endswith(".safetensors")]
    files = {name: (source / name).read_bytes() for name in names}
    config: dict[str, Any] = json.loads(files["config.json"]) | {"torch_dtype": DTYPES[kind]}
    return files | {"config.json": atomic_io.as_json(config)}


def _parts(tensors: "dict[str, Tensor]", most: int) -> "list[dict[str, Tensor]]":
    """In the order of their names, as many to a part as fit into `most` bytes, one at least."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        size += tensor.numel() * tensor.element_size()
        if parts[-1] and size > most:
            parts.append({})
            size = tensor.numel() * tensor.element_size()
        parts[-1][name] = tensor
    return parts


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Send the folder to the hub; its address there. RecipeError, without the token, where that fails."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise RecipeError("--push needs huggingface_hub: pip install huggingface_hub") from None
    from llm.data.documents import network_errors

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except network_errors() as error:
        # Only the kind of the error: its text may hold what was sent.
        raise RecipeError(
            f"{repository} was not sent to the hub ({type(error).__name__}): connect to the network and run "
            f"`hf auth login`; {folder} is whole"
        ) from None


if __name__ == "__main__":
    run(main)
