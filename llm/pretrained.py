"""Somebody else's weights: a folder of the Qwen3 or the Llama family, read from safetensors and JSON, nothing executed.

What our model does not do (scaled rotary positions, biases, sliding windows, code of the folder's own) is refused by
name rather than left out, as is a folder that could be read in two ways.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm import checkpoint, store
from llm.borrowed import borrow
from llm.cost import parameters
from llm.errors import RecipeError, RefusedError
from llm.model import Family
from llm.recipe import Model, Recipe, resolve
from llm.sharding import Rows
from llm.tokenizer import Tokenizer

FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DEFAULTS: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 128, "num_key_value_heads": 32}, "llama": {}}
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIELDS = {
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "tied": "tie_word_embeddings"}  # fmt: skip
# Fields by which a configuration could ask for another computation, each with the values that ask for ours. Null, and a
# field that is not there, ask for ours too.
OURS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "is_causal": (True,), "partial_rotary_factor": (1,), "per_layer_config": ({},), "quantization_config": (),
    "kv_sharing_modes": (), "transformers_weights": ()}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the families' defaults in it. RefusedError names what the model here does not do."""
    path = folder / "config.json"
    if not path.is_file():
        raise RecipeError(f"{path} is not there: name a model folder with config.json and safetensors")
    config = store.read_json(path, most_bytes=1 << 20)
    if not isinstance(config, dict):
        raise RefusedError(f"{path} is no configuration of a model")
    if config.get("auto_map") or config.get("trust_remote_code"):
        raise RefusedError(f"{path} asks for code of its own (auto_map), which is not run here")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise RefusedError(f"{path}: model_type = {_shown(family)}: {' or '.join(FAMILIES)} is expected")
    odd = [name for name, ours in OURS.items() if config.get(name) is not None and config[name] not in ours]
    layers = config.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(each == "full_attention" for each in layers)):
        odd.append("layer_types")
    if odd:
        raise RefusedError(f"{path}: {odd[0]} = {_shown(config[odd[0]])} asks for what the model here does not do")
    if (folder / "adapter_config.json").exists():
        raise RefusedError(f"{folder / 'adapter_config.json'} asks for an adapter, which is not applied here: merge it")
    theta = _rope_theta(path, config)
    heads = config.get("num_attention_heads")
    given: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": heads}
    given |= {name: value for name, value in DEFAULTS[family].items() if name not in config}
    given |= {name: value for name, value in config.items() if value is not None} | {"rope_theta": theta}
    if "head_dim" not in given and _is_size(heads) and _is_size(given.get("hidden_size")):
        given["head_dim"] = given["hidden_size"] // heads
    for name, value in (
        (name, given.get(name)) for name in [*FIELDS.values(), "vocab_size", "max_position_embeddings"]
    ):
        if not (isinstance(value, bool) if name == "tie_word_embeddings" else _is_size(value)):
            raise RefusedError(f"{path}: {name} = {_shown(value)} is not what a model has there")
    for name in ("rope_theta", "rms_norm_eps"):
        if isinstance(given[name], bool) or not isinstance(given[name], int | float) or not 0 < given[name] < 1e12:
            raise RefusedError(f"{path}: {name} = {_shown(given[name])}: a number above 0 is expected")
    return given


def _rope_theta(path: Path, config: dict[str, Any]) -> Any:
    """The base of the rotary positions, wherever it stands. RefusedError unless all that is said of them is ours."""
    said = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}  # of late, of old
    for name, rope in said.items():
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise RefusedError(f"{path}: {name} = {_shown(rope)} is not what a model has there")
        for key, ours in {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}.items():
            if rope.get(key, ours) != ours:
                raise RefusedError(
                    f"{path}: {name} = {_shown(rope)} asks for rotary positions that are scaled (rope_scaling) or turn "
                    f"a part of a head, which the model here does not do"
                )
    if len(said) > 1 and said["rope_parameters"] != said["rope_scaling"]:
        raise RefusedError(f"{path} says rope_parameters and another rope_scaling: leave one out")
    bases = [each["rope_theta"] for each in (config, *said.values()) if each.get("rope_theta") is not None]
    if bases and bases[0] != bases[-1]:
        raise RefusedError(f"{path} says rope_theta = {_shown(bases[0])} and {_shown(bases[-1])}: leave one out")
    return bases[0] if bases else 10_000.0


def _shown(value: Any) -> str:
    """A value of somebody else's JSON in a message."""
    return repr(value)[:60]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 24


def family(folder: Path) -> Family:
    """What no recipe says of the model in a folder: a checkpoint's of ours, or somebody else's."""
    config = read_config(folder)
    theta, eps, positions = (config[name] for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings"))
    return Family(config["model_type"], float(theta), float(eps), positions)


def family_of(recipe: Recipe) -> Family:
    return family(store.expanded(recipe.model.from_)) if recipe.model.from_ else Family()


def shaped(recipe: Recipe) -> Recipe:
    """The recipe with the shape of the folder model.from. RecipeError where it says another."""
    assert recipe.model.from_ is not None
    config = read_config(store.expanded(recipe.model.from_))
    shape, plain = recipe.model, Model(context=recipe.model.context)
    theirs = {name: config[field] for name, field in FIELDS.items()}
    resolved = resolve(replace(recipe, model=plain)).model
    for name, value in theirs.items():
        said = getattr(shape, name)
        if said not in (value, getattr(plain, name), getattr(resolved, name)):
            raise RecipeError(f"model.{name} = {said}, but {shape.from_} has {value}: leave it out")
    most = config["max_position_embeddings"]
    if shape.context > most:
        raise RecipeError(f"model.context = {shape.context} is more than the {most} tokens of {shape.from_}")
    recipe = resolve(replace(recipe, model=replace(shape, **theirs)))
    there = sum(path.stat().st_size for path in store.expanded(str(shape.from_)).glob("*.safetensors"))
    if (numbers := parameters(recipe.model, config["vocab_size"])) > there:  # before room is made for them
        raise RefusedError(f"{shape.from_} lacks weights: {there:,} bytes of safetensors only for {numbers:,} numbers")
    return recipe


def tokenizer_of(folder: Path) -> Tokenizer:
    return borrow(folder, read_config(folder))


def load(folder: Path, into: dict[str, Rows]) -> str:
    """Copy this process's rows of the folder's weights, whatever floating type they are of; a digest of their files.

    RefusedError where one is missing, left over, or of another shape.
    """
    names = _files(folder)
    wanted, heads = dict(into), []
    for name in names:
        if not (folder / name).is_file():
            raise RefusedError(f"{folder / name} is missing: weights are read from safetensors only")
        there = checkpoint.tensor_names(folder / name)
        for each in sorted(there - wanted.keys()):
            if each in into:
                raise RefusedError(f"{folder / name} holds {each}, which another file holds too")
            if each != HEAD and not each.endswith("rotary_emb.inv_freq"):  # what others keep, and nobody reads
                raise RefusedError(f"{folder / name} holds {each}, which the model here has no place for")
        heads += [name] if HEAD in there - into.keys() else []
        checkpoint.load_tensors(folder / name, {each: wanted.pop(each) for each in there & wanted.keys()}, more=True)
    if wanted:
        raise RefusedError(f"{folder} lacks {sorted(wanted)[0]}")
    for name in heads:  # of a model that is tied: others keep a head that differs
        head = into[EMBEDDING].like(torch.empty_like(into[EMBEDDING].local))
        checkpoint.load_tensors(folder / name, {HEAD: head}, more=True)
        if not torch.equal(head.local, into[EMBEDDING].local):
            raise RefusedError(
                f"{folder / name} holds another {HEAD} than {EMBEDDING}, while config.json says tie_word_embeddings = "
                f"true: make it false"
            )
    return store.digest_of([store.sha256(folder / name) for name in names])


def _files(folder: Path) -> list[str]:
    """Names of the files of weights. RefusedError where one lies outside of the folder, or none can be made out."""
    index = folder / INDEX
    if not index.is_file():
        return [checkpoint.WEIGHTS]
    whole = store.read_json(index)
    places = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise RefusedError(f"{index} is damaged: it has no weight_map of file names")
    names = sorted(set(places.values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise RefusedError(f"{index} names {odd[0][:80]!r}, a file outside of its folder: refused")
    if checkpoint.WEIGHTS not in names and (folder / checkpoint.WEIGHTS).exists():
        raise RefusedError(f"{folder} holds {checkpoint.WEIGHTS} and another model in {INDEX}: take one away")
    return names
