"""config.json of a Qwen3 or Llama folder, ours or somebody else's: fields that our model obeys or refuses."""

from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError
from llm.config.schema import Recipe
from llm.model.transformer import Family

FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DEFAULTS: dict[str, dict[str, Any]] = {"qwen3": {"head_dim": 128, "num_key_value_heads": 32}, "llama": {}}
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
    config = atomic_io.read_json(path, most_bytes=1 << 20)
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


def read_family(folder: Path) -> Family:
    """What no recipe says of the model in a folder: a checkpoint's of ours, or somebody else's."""
    config = read_config(folder)
    theta, eps, positions = (config[name] for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings"))
    return Family(config["model_type"], float(theta), float(eps), positions)


def family_of(recipe: Recipe) -> Family:
    return read_family(atomic_io.expanded(recipe.model.from_)) if recipe.model.from_ else Family()
