"""config.json of a Qwen3 or Llama folder, ours or foreign: every field is either obeyed by our model or refused."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError
from llm.config.schema import Recipe

if TYPE_CHECKING:  # a plan reads sizes without torch
    from llm.model.transformer import Family

MOST_SIZE = 1 << 24
FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DEFAULTS: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 128, "num_key_value_heads": 32}, "llama": {}}
FIELDS = {
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "tied": "tie_word_embeddings"}  # fmt: skip
# Fields by which a configuration could ask for another computation, with the values that mean ours. Null and a missing
# field mean ours too.
OURS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "is_causal": (True,), "partial_rotary_factor": (1,), "per_layer_config": ({},), "quantization_config": (),
    "kv_sharing_modes": (), "transformers_weights": ()}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, completed by its family's defaults. RefusedError names a field that our model does not support."""
    path = folder / "config.json"
    if not os.path.isfile(path):  # noqa: PTH113  # pathlib raises where a name is too long
        raise RecipeError(
            f"{path} is not there: name a model folder with config.json and safetensors, or a run, as runs/NAME/best"
        )
    config = atomic_io.read_json(path, most_bytes=1 << 20)
    if not isinstance(config, dict):
        raise RefusedError(f"{path} is not the configuration of a model")
    _refuse_unsupported(path, config)
    complete = _with_defaults(config) | {"rope_theta": _rope_theta(path, config)}
    _check_types(path, complete)
    return complete


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    """RefusedError where the folder asks for code, another architecture, another computation or an adapter."""
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
        raise RefusedError(f"{path}: {odd[0]} = {_shown(config[odd[0]])} is not supported by the model here")
    adapter = path.with_name("adapter_config.json")
    if adapter.exists():
        raise RefusedError(f"{adapter} asks for an adapter, which is not applied here: merge it")


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null, and transformers' defaults for the others."""
    heads = config.get("num_attention_heads")
    complete: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": heads}
    complete |= {name: value for name, value in DEFAULTS[config["model_type"]].items() if name not in config}
    complete |= {name: value for name, value in config.items() if value is not None}
    if "head_dim" not in complete and _is_size(heads) and _is_size(complete.get("hidden_size")):
        complete["head_dim"] = complete["hidden_size"] // heads
    return complete


def _check_types(path: Path, config: dict[str, Any]) -> None:
    for name in (*FIELDS.values(), "vocab_size", "max_position_embeddings"):
        value = config.get(name)
        is_flag = name == "tie_word_embeddings"
        if not (isinstance(value, bool) if is_flag else _is_size(value)):
            rule = "true or false" if is_flag else f"a whole number from 1 to {MOST_SIZE:,}"
            raise RefusedError(f"{path}: {name} = {_shown(value)}: {rule} is expected")
    for name in ("rope_theta", "rms_norm_eps"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise RefusedError(f"{path}: {name} = {_shown(value)}: a number above 0 is expected")


def _rope_theta(path: Path, config: dict[str, Any]) -> Any:
    """The base of the rotary positions. RefusedError where they are scaled, partial, or given twice and differently."""
    given = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}  # new, old name
    for name, rope in given.items():
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise RefusedError(f"{path}: {name} = {_shown(rope)}: an object of plain values is expected")
        for key, ours in {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}.items():
            if rope.get(key, ours) != ours:
                kinds = "rotary positions that are scaled (rope_scaling) or turn a part of a head"
                fault = f"asks for {kinds}, which the model here does not support"
                raise RefusedError(f"{path}: {name} = {_shown(rope)} {fault}")
    if len(given) > 1 and given["rope_parameters"] != given["rope_scaling"]:
        raise RefusedError(f"{path} has rope_parameters and a different rope_scaling: leave one out")
    bases = [each["rope_theta"] for each in (config, *given.values()) if each.get("rope_theta") is not None]
    if bases and bases[0] != bases[-1]:
        raise RefusedError(f"{path} has rope_theta = {_shown(bases[0])} and {_shown(bases[-1])}: leave one out")
    return bases[0] if bases else 10_000.0


def _shown(value: Any) -> str:
    """A foreign JSON value, shortened for a message."""
    return repr(value)[:60]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_SIZE


def read_family(folder: Path) -> "Family":
    """The properties of the model in a folder, ours or foreign, that no recipe states."""
    from llm.model.transformer import Family

    config = read_config(folder)
    theta, eps, positions = (config[name] for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings"))
    return Family(config["model_type"], float(theta), float(eps), positions)


def family_of(recipe: Recipe, checkpoints: Sequence[Path] = ()) -> "Family":
    """Those of the recipe's model: of model.from or, where that is gone, of the run's own `checkpoints`."""
    from llm.model.transformer import Family

    if not recipe.model.from_:
        return Family()
    folder = atomic_io.expanded(recipe.model.from_)
    return read_family(checkpoints[0] if checkpoints and not folder.is_dir() else folder)
