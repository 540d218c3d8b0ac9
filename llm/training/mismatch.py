"""Which checkpoints a recipe cannot go on from, and the one key or text that is to blame."""

from llm.base.errors import RecipeError, RefusedError
from llm.config.resolving import checkpoint_name, skipped
from llm.config.schema import Recipe, said, science
from llm.data.batches import batch_at
from llm.data.tokenizer import Tokenizer
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


def refuse_parent(source: Checkpoint, recipe: Recipe, parts: Parts, tokenizer: Tokenizer | None) -> None:
    """RefusedError unless a run of this recipe can begin from the checkpoint `source`, which its `from` names.

    Without `tokenizer`, as long as it is not known, it is not compared, nor are sizes that model.from brings.
    """
    stored, run = source.manifest["science"], source.folder.parent.parent
    if tokenizer is not None and source.manifest["tokenizer"] != tokenizer.fingerprint:
        given = "tokenizer.path" if recipe.tokenizer.path else "this recipe's text"
        mend = f"keep its own by tokenizer.path={run / 'tokenizer/tokenizer.model'}"
        raise RefusedError(f"from = {recipe.from_} has another tokenizer than {given} gives: {mend}")
    refuse_parts(source, parts)
    if bool(stored.get("model.from")) != bool(recipe.model.from_):  # it decides how embeddings begin and move
        mend = "leave it out" if recipe.model.from_ else f"use {run / 'recipe.yaml'}"
        raise RefusedError(
            f"from = {recipe.from_} has model.from = {said(stored.get('model.from'))}, this recipe "
            f"{said(recipe.model.from_)}: {mend}"
        )
    _refuse_skip(source, recipe)
    if tokenizer is not None or not recipe.model.from_:
        _refuse_shape(source, recipe)


def _refuse_skip(source: Checkpoint, recipe: Recipe) -> None:
    """RefusedError unless the checkpoint left out the same batches as this recipe up to its step."""
    theirs, ours = source.manifest["science"].get("train.skip") or [], list(recipe.train.skip)

    def reached(skip: list[str]) -> list[tuple[int, int]]:
        """The ranges that the checkpoint's last batch lies behind."""
        ranges = skipped(skip)
        return sorted(each for each in ranges if source.step and each[0] <= batch_at(source.step - 1, ranges))

    if reached(theirs) != reached(ours):
        later = [each for each in skipped(ours) if each[0] > batch_at(source.step - 1, skipped(theirs)) + 1]
        keep = ",".join(f"{low}-{high}" for low, high in [*reached(theirs), *sorted(later)])
        raise RefusedError(
            f"from = {recipe.from_} has train.skip = {said(theirs)}, this recipe {said(ours)}: "
            f"the steps up to {source.step} are done, so say 'train.skip=[{keep}]'"
        )


def refuse_skip_beyond(recipe: Recipe) -> None:
    """RecipeError where a range of train.skip lies beyond the end of a run whose length in steps is known."""
    ranges = skipped(recipe.train.skip)
    for text, (low, _) in zip(recipe.train.skip, ranges, strict=True):
        if recipe.train.steps and low > batch_at(recipe.train.steps - 1, ranges) + 1:
            raise RecipeError(f"train.skip = {text} lies beyond the run's {recipe.train.steps:,} steps: leave it out")


def _refuse_shape(source: Checkpoint, recipe: Recipe) -> None:
    """RefusedError that names the first key by which a checkpoint for `from` has other tensors than this recipe."""
    stored, wanted, run = source.manifest["science"], science(recipe), source.folder.parent.parent
    for name in SHAPE:
        if stored.get(name) != wanted[name]:
            theirs = f"from = {recipe.from_} has {name} = {stored.get(name)}"
            mend = f"use {run / 'recipe.yaml'}"
            if name == "train.optimizer":
                mend = f"say {name}={stored.get(name)}, or begin from its weights alone by model.from={source.folder}"
            raise RefusedError(f"{theirs}, this recipe {wanted[name]}: {mend}")


def refuse_difference(found: Checkpoint, recipe: Recipe, tokenizer: str, data: str) -> None:
    """RefusedError if this recipe's science half or text differs from that of the run; it names what the run had.

    It names the text first, since many keys follow from it, else the first differing key that follows from no other.
    """
    other = "take another run=NAME"
    ways = f"{other}, or start a new run from it with run=NAME from={recipe.run}/{found.folder.name}"
    stored, wanted = dict(found.manifest["science"]), science(recipe)
    if recipe.tokenizer.path or recipe.model.from_:  # which bring their pieces, so the number is without effect
        stored["tokenizer.vocabulary"] = wanted["tokenizer.vocabulary"]
    if isinstance(stored.get("from"), str):
        stored["from"] = checkpoint_name(stored["from"])  # earlier ones kept it as it was written
    if found.manifest["format"] == 1 and stored.get("train.skip") != wanted["train.skip"]:
        ways = f"train.skip once counted steps from 0, and now from 1, as all messages do; {ways}"
    differ = [name for name in [*wanted, *stored] if stored.get(name) != wanted.get(name)]
    reads_alike = not any(name.startswith(("text.", "tokenizer.", "model.from")) for name in differ)
    if reads_alike and found.manifest["data"] != data:
        cause = "another text" if found.manifest["tokenizer"] == tokenizer else "another tokenizer"
        if not recipe.tokenizer.path and not recipe.model.from_:  # else the new run would train one of its own
            ways += f" tokenizer.path={found.folder.parent.parent / 'tokenizer/tokenizer.model'}"
        fingerprints = f"fingerprint {found.manifest['data'][:12]}, now {data[:12]}"
        raise RefusedError(f"run {recipe.run} was trained with {cause} ({fingerprints}): {ways}")
    for name in differ:
        if not FOLLOWS.get(name, set()).intersection(differ):
            fault = f"was trained with {name} = {said(stored.get(name))}, this recipe says {said(wanted.get(name))}"
            fixed = name in SHAPE or name.startswith("tokenizer.")  # also in a run that begins from this one
            raise RefusedError(f"run {recipe.run} {fault}: {other if fixed else ways}")
