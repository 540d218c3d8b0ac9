"""Somebody else's weights: a folder of the Qwen3 or the Llama family, read from safetensors and JSON, nothing executed.

What our model does not do (scaled rotary positions, biases, sliding windows, code of the folder's own) is refused by
name rather than left out.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llm import checkpoint, store
from llm.borrowed import borrow
from llm.cost import parameters
from llm.errors import RecipeError, RefusedError
from llm.model import Family
from llm.recipe import Model, Recipe, resolve
from llm.sharding import Rows
from llm.tokenizer import Tokenizer

FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
INDEX = "model.safetensors.index.json"
FIELDS = {
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "tied": "tie_word_embeddings"}  # fmt: skip


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
    if config.get("model_type") not in FAMILIES:
        raise RefusedError(
            f"{path}: model_type = {str(config.get('model_type'))[:40]!r}: {' or '.join(FAMILIES)} is expected"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise RefusedError(f"{path}: rope_parameters = {str(rope)[:40]!r} is not what a model has there")
    for what, asked in {
        "scaled rotary positions (rope_scaling)": rope.get("rope_type", rope.get("type", "default")) != "default",
        "rotary positions on a part of a head": config.get("partial_rotary_factor", 1.0) != 1.0,
        "biases (attention_bias)": config.get("attention_bias"),
        "biases (mlp_bias)": config.get("mlp_bias"),
        "sliding windows (use_sliding_window)": config.get("use_sliding_window")
        or "sliding_attention" in str(config.get("layer_types")),
        "quantised weights (quantization_config)": config.get("quantization_config"),
        "another activation than silu (hidden_act)": config.get("hidden_act", "silu") != "silu",
    }.items():
        if asked:
            raise RefusedError(f"{path} asks for {what}, which the model here does not do")
    heads = config.get("num_attention_heads")
    bases = [each["rope_theta"] for each in (config, rope) if each.get("rope_theta") is not None]  # of old, of late
    if bases and bases[0] != bases[-1]:
        raise RefusedError(f"{path} says rope_theta = {str(bases[0])[:40]} and {str(bases[-1])[:40]}: leave one out")
    theta = bases[0] if bases else 10_000.0
    given: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    given |= {"rope_theta": theta, "num_key_value_heads": heads}
    given |= {name: value for name, value in config.items() if value is not None}
    if "head_dim" not in given and _is_size(heads) and _is_size(given.get("hidden_size")):
        given["head_dim"] = given["hidden_size"] // heads
    for name, value in (
        (name, given.get(name)) for name in [*FIELDS.values(), "vocab_size", "max_position_embeddings"]
    ):
        if not (isinstance(value, bool) if name == "tie_word_embeddings" else _is_size(value)):
            raise RefusedError(f"{path}: {name} = {str(value)[:40]!r} is not what a model has there")
    for name in ("rope_theta", "rms_norm_eps"):
        if not isinstance(given[name], int | float) or not 0 < given[name] < 1e12:
            raise RefusedError(f"{path}: {name} = {str(given[name])[:40]!r}: a number above 0 is expected")
    return given


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
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(map(str, store.read_json(index).get("weight_map", {}).values())))
        if odd := [name for name in names if Path(name).name != name]:
            raise RefusedError(f"{index} names {odd[0][:80]!r}, a file outside of its folder: refused")
    else:
        names = [checkpoint.WEIGHTS]
    wanted = dict(into)
    for name in names:
        if not (folder / name).is_file():
            raise RefusedError(f"{folder / name} is missing: weights are read from safetensors only")
        there = checkpoint.tensor_names(folder / name)
        for each in sorted(there - into.keys()):
            if each != "lm_head.weight" and not each.endswith(
                "rotary_emb.inv_freq"
            ):  # what others keep, and nobody reads
                raise RefusedError(f"{folder / name} holds {each}, which the model here has no place for")
        checkpoint.load_tensors(folder / name, {each: wanted.pop(each) for each in there & wanted.keys()}, more=True)
    if wanted:
        raise RefusedError(f"{folder} lacks {sorted(wanted)[0]}")
    return store.digest_of([store.sha256(folder / name) for name in names])
