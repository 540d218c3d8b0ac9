"""Which checkpoints a recipe cannot go on from, and the one key or text that is to blame."""

from llm.base.errors import RefusedError
from llm.config.resolving import checkpoint_name
from llm.config.schema import Recipe, science
from llm.run_folder.checkpoint import Checkpoint
from llm.training.context import Parts

# Keys that decide which weight and moment tensors exist, and their shapes.
SHAPE = (
    "model.layers", "model.dim", "model.heads", "model.kv_heads", "model.head_dim", "model.ffn_dim", "model.tied",
    "train.optimizer")  # fmt: skip
# Keys that are computed from others where the length is in tokens or epochs, or where they are `auto`.
FOLLOWS = {
    "train.steps": {"train.tokens_per_step"},
    "model.dropout": {"train.steps", "train.tokens_per_step"},
    "train.weight_decay": {"train.steps", "train.tokens_per_step", "train.learning_rate"},
}


def refuse_parts(source: Checkpoint, parts: Parts) -> None:
    """RefusedError unless checkpoint and run agree on whether model and optimizer are a caller's own."""
    for part in ("model", "optimizer"):
        theirs, ours = (names.get(part) for names in (source.manifest.get("parts", {}), parts.names()))
        if bool(theirs) != bool(ours):
            mend = f"pass {part}= to llm.train" if theirs else f"leave {part}= out"
            fault = f"was trained with {part} = {theirs or 'our own'}, this start has {ours or 'our own'}"
            raise RefusedError(f"{source.folder} {fault}: {mend}, or take another run=NAME")


def refuse_shape(source: Checkpoint, recipe: Recipe) -> None:
    """RefusedError that names the first key by which a checkpoint for `from` has other tensors than this recipe."""
    stored, wanted, run = source.manifest["science"], science(recipe), source.folder.parent.parent
    for name in SHAPE:
        if stored.get(name) != wanted[name]:
            theirs = f"from = {recipe.from_} has {name} = {stored.get(name)}"
            raise RefusedError(f"{theirs}, this recipe {wanted[name]}: use {run / 'recipe.yaml'}")


def refuse_difference(found: Checkpoint, recipe: Recipe, tokenizer: str, data: str) -> None:
    """RefusedError if this recipe's science half or text differs from that of the run; it names what the run had.

    It names the text first, since many keys follow from it, else the first differing key that follows from no other.
    """
    other = "take another run=NAME"
    ways = f"{other}, or start a new run from it with run=NAME from={recipe.run}/{found.folder.name}"
    stored, wanted = dict(found.manifest["science"]), science(recipe)
    if isinstance(stored.get("from"), str):
        stored["from"] = checkpoint_name(stored["from"])  # earlier ones kept it as it was written
    if found.manifest["format"] == 1 and stored.get("train.skip") != wanted["train.skip"]:
        ways = f"train.skip once counted steps from 0, and now from 1, as all messages do; {ways}"
    differ = [name for name in [*wanted, *stored] if stored.get(name) != wanted.get(name)]
    reads_alike = not any(name.startswith(("text.", "tokenizer.", "model.from")) for name in differ)
    if reads_alike and found.manifest["data"] != data:
        cause = "another text"
        if found.manifest["tokenizer"] != tokenizer:
            given = recipe.tokenizer.path or recipe.model.from_
            cause = "another tokenizer" if given else "another text, and so with another tokenizer"
        fingerprints = f"fingerprint {found.manifest['data'][:12]}, now {data[:12]}"
        raise RefusedError(f"run {recipe.run} was trained with {cause} ({fingerprints}): {ways}")
    for name in differ:
        if not FOLLOWS.get(name, set()).intersection(differ):
            fault = f"was trained with {name} = {stored.get(name)}, this recipe says {wanted.get(name)}"
            raise RefusedError(f"run {recipe.run} {fault}: {other if name in SHAPE else ways}")
