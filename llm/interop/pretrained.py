"""Foreign weights: a folder of the Qwen3 or the Llama family, read from safetensors and JSON; nothing is executed.

Features that our model lacks (scaled rotary positions, biases, sliding windows, the folder's own code) are refused by
name, never ignored, and so is a folder that could be read in two ways.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError, naming
from llm.config.resolving import resolve, with_steps, with_vocabulary
from llm.config.schema import Model, Recipe
from llm.data import hf_tokenizer, prompts
from llm.data.mixed_pipeline import Prepared, prepare
from llm.data.mixture import order_of, tokens_per_epoch
from llm.data.progress import Say
from llm.data.shards import AnyShards
from llm.data.sharing import Team
from llm.data.sources import Source, own_source
from llm.data.tokenizer import Tokenizer
from llm.distributed.process import warn
from llm.distributed.sharding import LocalShard
from llm.model.cost import parameters
from llm.model.hf_config import FIELDS, read_config
from llm.run_folder import checkpoint, loaded_run, tensor_files

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def folder_of(name: str) -> Path:
    """The model folder that model.from names; of a run, as runs/NAME or runs/NAME/best, that of its checkpoint.

    RecipeError where there is no such run, or it has no checkpoint.
    """
    path = atomic_io.expanded(name)
    of_run = path.name in ("best", "newest") or checkpoint.step_of(path.name) >= 0
    # pathlib raises where a name is too long.
    if os.path.exists(path / "config.json") or not (os.path.isdir(path / "checkpoints") or of_run):  # noqa: PTH110, PTH112
        return path
    run, which = loaded_run.find(str(path))
    if which.startswith("step-"):
        return checkpoint.folder_of(run, checkpoint.step_of(which))
    found = checkpoint.best(run, warn=warn) if which == "best" else None
    found = found or checkpoint.newest(run, warn)
    assert found is not None, "find refuses a run without a checkpoint"
    return found.folder


def tokenizer_of(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a model folder; for a checkpoint of ours the very one that its run keeps."""
    if folder.parent.name == "checkpoints" and (folder / checkpoint.MANIFEST).is_file():
        tokenizer = hf_tokenizer.load(folder.parent.parent / "tokenizer")
        if tokenizer.fingerprint == checkpoint.read_manifest(folder)["tokenizer"]:
            return tokenizer
        raise RefusedError(f"{folder.parent.parent / 'tokenizer'} is not the tokenizer that {folder} was trained with")
    return hf_tokenizer.borrow(folder, config)


def shaped(recipe: Recipe) -> Recipe:
    """The recipe with the shape of the folder model.from. RecipeError where the recipe asks for another."""
    assert recipe.model.from_ is not None
    folder = atomic_io.expanded(recipe.model.from_)
    config = read_config(folder)
    shape, plain = recipe.model, Model(context=recipe.model.context)
    theirs = {name: config[field] for name, field in FIELDS.items()}
    resolved = resolve(replace(recipe, model=plain)).model
    for name, value in theirs.items():
        said = getattr(shape, name)
        if said not in (value, getattr(plain, name), getattr(resolved, name)):
            raise RecipeError(f"model.{name} = {said}, but {shape.from_} has {value}: leave the model's sizes out")
    recipe = resolve(replace(recipe, model=replace(shape, **theirs)))
    refuse_unfit(recipe.model, folder, config)
    return recipe


def refuse_unfit(shape: Model, folder: Path, config: dict[str, Any]) -> None:
    """Before memory is allocated: RecipeError or RefusedError if the folder's model cannot be one of this shape."""
    most = config["max_position_embeddings"]
    ours = (folder / checkpoint.MANIFEST).is_file()  # and rotates any position
    if shape.context > most and not ours:
        raise RecipeError(f"model.context = {shape.context} is more than the {most} tokens of {folder}")
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if (needed := parameters(shape, config["vocab_size"])) > there:
        raise RefusedError(f"{folder} lacks weights: {there:,} bytes of safetensors only for {needed:,} parameters")


def prepare_for(
    recipe: Recipe,
    say: Say = print,
    verify: bool = False,
    own: Source | None = None,
    anew: bool = False,
    team: Team | None = None,
) -> tuple[Recipe, Prepared]:
    """Prepare the recipe's text, or `own` documents; model.from, if given, provides the shape and the tokenizer."""
    tokenizer = None
    if recipe.model.from_:
        with naming("model.from"):
            folder = folder_of(recipe.model.from_)
        recipe = shaped(replace(recipe, model=replace(recipe.model, from_=str(folder))))
        tokenizer = tokenizer_of(folder, read_config(folder))
    prepared = prepare(recipe, say, verify=verify, tokenizer=tokenizer, own=own, anew=anew, team=team)
    return with_vocabulary(recipe, prepared.tokenizer.vocab_size), prepared


def ready(
    recipe: Recipe,
    say: Say = print,
    documents: Callable[[], Iterable[str | bytes]] | None = None,
    team: Team | None = None,
) -> tuple[Recipe, Tokenizer, AnyShards]:
    """Prepare for the trainer, and complete the recipe by its length in steps and its prompts.

    `documents` gives them instead of text.files, which then names the callable (see llm.api.train). On the first
    process of each of several machines, `team` is all of these.
    """
    own = own_source(recipe.text.files[0], documents) if documents else None
    recipe, prepared = prepare_for(recipe, say, own=own, team=team)
    recipe = prompts.with_prompts(recipe, prepared.tokenizer, prepared.shards)
    recipe = with_steps(recipe, tokens_per_epoch(recipe, prepared.shards))
    if any(source.epochs for source in recipe.text.sources):
        order_of(recipe, prepared.shards)  # refuses a mixture that cannot be had
    return recipe, prepared.tokenizer, prepared.shards


def load(folder: Path, into: dict[str, LocalShard]) -> str:
    """Copy this process's rows of the folder's weights, of any floating type; return a digest of their files.

    RefusedError where a tensor is missing, left over, or of another shape, or a checkpoint of ours is damaged.
    """
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.open_checkpoint(folder)
    names = _files(folder)
    wanted, heads = dict(into), []
    for name in names:
        if not (folder / name).is_file():
            raise RefusedError(f"{folder / name} is missing: weights are read from safetensors only")
        there = tensor_files.tensor_names(folder / name)
        for each in sorted(there - wanted.keys()):
            if each in into:
                raise RefusedError(f"{folder / name} holds {each}, which another file holds too")
            if each != HEAD and not each.endswith("rotary_emb.inv_freq"):  # redundant tensors that some libraries save
                raise RefusedError(f"{folder / name} holds {each}, which the model here has no place for")
        heads += [name] if HEAD in there - into.keys() else []
        here = {each: wanted.pop(each) for each in there & wanted.keys()}
        tensor_files.load_tensors(folder / name, here, allow_extra=True)
    if wanted:
        raise RefusedError(f"{folder} lacks {sorted(wanted)[0]}")
    for name in heads:  # of a tied model: its head must equal the embedding
        head = into[EMBEDDING].like(torch.empty_like(into[EMBEDDING].local))
        tensor_files.load_tensors(folder / name, {HEAD: head}, allow_extra=True)
        if not torch.equal(head.local, into[EMBEDDING].local):
            said = "while config.json says tie_word_embeddings = true: set it to false"
            raise RefusedError(f"{folder / name} holds another {HEAD} than {EMBEDDING}, {said}")
    return atomic_io.digest_of([atomic_io.sha256(folder / name) for name in names])


def _files(folder: Path) -> list[str]:
    """Names of the files of weights. RefusedError where the index is damaged, ambiguous or leaves the folder."""
    index = folder / INDEX
    if not index.is_file():
        return [checkpoint.WEIGHTS]
    whole = atomic_io.read_json(index)
    places = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise RefusedError(f"{index} is damaged: it has no weight_map of file names")
    names = sorted(set(places.values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise RefusedError(f"{index} names {odd[0][:80]!r}, a file outside of its folder: refused")
    if checkpoint.WEIGHTS not in names and (folder / checkpoint.WEIGHTS).exists():
        raise RefusedError(f"{folder} holds {checkpoint.WEIGHTS} and another model in {INDEX}: remove one of them")
    return names
