"""python -m llm.export [RUN]: a folder for the hub or a GGUF file, compared with the run before it gets its name."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm.base.atomic_io import draft_folder, expanded
from llm.base.command import MEAN_HELP, Parser
from llm.base.errors import RecipeError, RefusedError, run

if TYPE_CHECKING:
    from llm.run_folder.loaded_run import LoadedRun

GGUF = ("f32", "f16", "bf16", "q8_0")
HUB_NAME = r"(?a)(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?"  # as the hub has it
SHARD = 4 << 30  # bytes of a file of weights


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "export",
        "Write a run's model for other programs, read it again with their library, and keep it only if it says the "
        "same: equal ids, logits equal to the bit in fp32, within a stated bound elsewhere.",
    )
    parser.add_run()
    add = parser.add_argument
    add("--mean", action="append", default=[], metavar="RUN", help=MEAN_HELP)
    add("--to", type=Path, metavar="FOLDER", help="default: exports/RUN, and the type where it is not fp32")
    add("--dtype", choices=("fp32", "bf16"), help="of the weights (default fp32)")
    parser.add_number("--shard", least=1, metavar="BYTES", help="largest file, in bytes (default 4 GiB)")
    add("--gguf", choices=GGUF, help="write a file of this type for llama.cpp and Ollama instead")
    add("--push", metavar="OWNER/NAME", help="then send it to the hub, with the token of `hf auth login`")
    add("--public", action="store_true", help="make a new repository of the hub public, not private")
    given = parser.parse_args(arguments)
    if given.push and not re.fullmatch(HUB_NAME, given.push):
        rule = "each up to 96 of A-Z a-z 0-9 _ - ., with no - or . at its ends, no -- or .. in it, no .git at the end"
        raise RecipeError(f"--push = {given.push[:80]!r}: OWNER/NAME is expected, {rule}")
    if given.gguf and given.dtype:
        raise RecipeError(f"--dtype is of a folder: leave it out, as --gguf {given.gguf} names the type")
    if given.gguf and given.shard is not None:
        raise RecipeError("--shard is of a folder: leave it out, as --gguf writes one file")
    if given.public and not given.push:
        raise RecipeError("--public is for --push: name the repository by it")
    given.dtype = given.dtype or "fp32"
    import torch

    from llm.run_folder.loaded_run import find, open_mean

    kind = given.gguf or given.dtype
    suffix = f"-gguf-{kind}" if given.gguf else "" if kind == "fp32" else f"-{kind}"
    target = expanded(given.to) if given.to else Path("exports") / f"{find(given.run)[0].name}{suffix}"
    try:
        str(target.absolute()).encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{target} is not UTF-8, and safetensors opens no such file: name another by --to") from None
    if target.exists() or target.is_symlink():
        raise RecipeError(f"{target} is there already: remove it, or name another folder by --to")
    opened = open_mean(given.run, given.mean, torch.device("cpu"))
    try:
        with draft_folder(target) as draft:
            for line in write_and_check(draft, opened, given):
                print(line)
    except RefusedError as error:
        lost = f"{target} was not kept"
        raise RefusedError(f"the export of {opened.name} does not match the run: {error}; {lost}") from error
    megabytes = sum(each.stat().st_size for each in target.iterdir()) / 1e6
    print(f"{opened.name} is exported to {target}: {kind}, {megabytes:,.1f} MB")
    if given.push:
        from llm.interop.hub import push

        print(push(target, given.push, private=not given.public))


def write_and_check(folder: Path, opened: "LoadedRun", given: argparse.Namespace) -> Iterator[str]:
    """Fill `folder`; lines on what agrees with the run. RefusedError names the first difference."""
    if given.gguf:
        from llm.interop import gguf

        gguf.write(folder, opened, given.gguf)
        yield from gguf.check(folder, opened, given.gguf)
    else:
        from llm.interop import folder_export
        from llm.interop.parity import check_folder

        folder_export.write_folder(folder, opened, given.dtype, given.shard or SHARD)
        yield from check_folder(folder, opened.model, opened.tokenizer, given.dtype, chat=opened.is_chat)


if __name__ == "__main__":
    run(main)
