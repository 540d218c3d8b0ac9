"""Teachers: finished runs whose probabilities a run learns beside its text.

Knowledge distillation (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015). A teacher reads
the same batch as the run, so nothing is stored, and what it says follows from the recipe and its weights alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

from llm.base.errors import GroupError, RecipeError, RefusedError, naming
from llm.config.schema import Model, Recipe, Train
from llm.data.tokenizer import Tokenizer
from llm.distributed.sharding import local_shard
from llm.interop import pretrained
from llm.model.hf_config import FIELDS, read_config, read_family
from llm.model.transformer import Transformer
from llm.training.context import Parts, RunContext
from llm.training.memory import within_memory


def share(train: Train, lr_factor: float) -> float:
    """The share of the teachers in each target of a step, whose rate is full times `lr_factor`."""
    return train.teachers_last + (train.teachers_share - train.teachers_last) * lr_factor


def load(context: RunContext) -> tuple[list[Transformer], list[str]]:
    """The models that train.teachers names, whole on this process's device, and a digest of the weights of each.

    RecipeError or RefusedError where one cannot be read, or has other pieces than this run.
    """
    models, digests = [], []
    recipe = context.recipe
    named = find(recipe, context.parts, context.tokenizer)
    for name, (folder, config) in zip(recipe.train.teachers, named, strict=True):
        with naming("train.teachers"):
            found = within_memory(partial(_load, name, folder, config, context))
        if found is None:
            raise GroupError(f"train.teachers: no memory for {name}: leave it out, or name a smaller one")
        models.append(found[0])
        digests.append(found[1])
    return models, digests


def find(recipe: Recipe, parts: Parts, tokenizer: Tokenizer | None) -> list[tuple[Path, dict[str, Any]]]:
    """The folders that train.teachers names, each with its config.json.

    RecipeError where one is not there, RefusedError where one has other pieces than `tokenizer`, if that is known.
    """
    if recipe.train.teachers and parts.model is not None:
        raise RecipeError("train.teachers is for the model of this project: leave it out beside model=")
    with naming("train.teachers"):
        found = [(folder, read_config(folder)) for folder in map(pretrained.folder_of, recipe.train.teachers)]
        for name, (folder, config) in zip(recipe.train.teachers, found, strict=True):
            if tokenizer is not None and not tokenizer.has_pieces_of(pretrained.tokenizer_of(folder, config)):
                mend = "say model.from or tokenizer.path so that both have the same, or train it again on this text"
                raise RefusedError(f"{name} has another tokenizer than this run: {mend}")
    return found


def _load(name: str, folder: Path, config: dict[str, Any], context: RunContext) -> tuple[Transformer, str]:
    sizes = {key: config[field] for key, field in FIELDS.items()}
    shape = Model(context=context.recipe.model.context, **sizes)
    pretrained.refuse_unfit(shape, folder, config)
    with context.device:
        model = Transformer(shape, context.tokenizer.vocab_size, family=read_family(folder)).requires_grad_(False)
    weights = {each: local_shard(weight) for each, weight in model.named_parameters()}
    digest = pretrained.load(folder, weights)
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise RefusedError(f"{name} has weights that are not finite")
    return model, digest


def refuse_others(named: tuple[str, ...], found: list[str], recorded: list[str]) -> None:
    """RefusedError unless the teachers `named`, with the digests `found`, are those that the run began with."""
    for name, mine, theirs in zip(named, found, recorded, strict=True):
        if mine != theirs:
            mend = "put them back, or take another run=NAME"
            raise RefusedError(f"train.teachers: {name} no longer has the weights that this run began with: {mend}")
