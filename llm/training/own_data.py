"""The data that a run was trained on: its own tokenizer and shards, by which it resumes without its text."""

from dataclasses import replace
from pathlib import Path

from llm.base import atomic_io
from llm.base.errors import LLMError, RecipeError, RefusedError, TextError, naming
from llm.config.reading import load
from llm.config.resolving import resolve, with_steps, with_vocabulary
from llm.config.schema import Recipe
from llm.data import hf_tokenizer, prompts
from llm.data.mixed_pipeline import texts
from llm.data.mixture import tokens_per_epoch
from llm.data.pipeline import prepare_also
from llm.data.progress import Say, Show
from llm.data.shards import PLACE, AnyShards, of_run
from llm.data.survey import has_changed
from llm.data.tokenizer import Tokenizer
from llm.distributed.process import say, warn
from llm.interop import pretrained
from llm.model.hf_config import FIELDS
from llm.run_folder import checkpoint


def find(recipe: Recipe, run: Path) -> tuple[Recipe, Tokenizer, AnyShards] | None:
    """The complete recipe, tokenizer and shards of a run that has a checkpoint, without reading its text.

    None where the run is new, its shards are not whole, or the recipe names another text or tokenizer.
    """
    try:
        if not checkpoint.folders(run) or not (run / PLACE).is_file():
            return None
        recorded = load(run / "recipe.yaml")
        if _named(recipe) != _named(recorded):
            return None
        tokenizer, shards = hf_tokenizer.load(run / "tokenizer"), of_run(run, verify=None)
    except (RefusedError, RecipeError) as error:
        warn(f"{error}; the text is read instead")
        return None
    if any(tokenizer.fingerprint != each.manifest["tokenizer"] for each in shards.sources.values()):
        return None
    if recipe.tokenizer.path not in (None, recorded.tokenizer.path):
        other = Tokenizer.load(atomic_io.expanded(recipe.tokenizer.path or ""))
        if other.fingerprint != tokenizer.fingerprint:
            return None
    if recipe.model.from_:
        recipe = _as_it_began(recipe, recorded)
    if recipe.evaluate.also != recorded.evaluate.also or bool(recipe.evaluate.also) != bool(shards.also):
        shards.also = prepare_also(recipe, tokenizer, say) if recipe.evaluate.also else None
    recipe = with_vocabulary(prompts.with_prompts(recipe, tokenizer, shards), tokenizer.vocab_size)
    if recipe.model.dropout == "auto":  # an earlier version drew the line at fewer epochs
        recipe = replace(recipe, model=replace(recipe.model, dropout=recorded.model.dropout))
    return with_steps(recipe, tokens_per_epoch(recipe, shards)), tokenizer, shards


def tokenizer_path(recipe: Recipe, run: Path) -> str | None:
    """The tokenizer for a text that is prepared anew: that of the run, if it has checkpoints and the recipe names none.

    Training one again would not give the same if the text was changed, even where it has been restored since.
    """
    path, found = run / "tokenizer" / "tokenizer.model", checkpoint.folders(run)
    if recipe.tokenizer.path or recipe.model.from_ or not found or not path.is_file():
        return recipe.tokenizer.path
    try:
        is_own = Tokenizer.load(path).fingerprint == checkpoint.read_manifest(found[0])["tokenizer"]
    except LLMError:  # damaged: the reader of the checkpoint reports it, and the tokenizer is trained again
        return None
    return str(path) if is_own else None


def _as_it_began(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe with the folder and the sizes that model.from meant when the run began, though it may be gone by now.

    Of runs/NAME/best, that is the checkpoint that it was then.
    """
    assert recipe.model.from_ is not None
    named, kept = atomic_io.expanded(recipe.model.from_), Path(recorded.model.from_ or "")
    source = named.parent if named.name in ("best", "newest") else named
    if (step := checkpoint.step_of(named.name)) >= 0 and named.parent.name != "checkpoints":
        source = checkpoint.folder_of(named.parent, step)
    is_same = recorded.model.from_ is not None and source in (kept, kept.parent.parent)
    if is_same and not kept.is_dir():
        sizes = {name: getattr(recorded.model, name) for name in FIELDS}
        return resolve(replace(recipe, model=replace(recipe.model, from_=recorded.model.from_, **sizes)))
    with naming("model.from"):
        folder = kept if is_same else pretrained.folder_of(recipe.model.from_)
    return pretrained.shaped(replace(recipe, model=replace(recipe.model, from_=str(folder))))


def _named(recipe: Recipe) -> dict[str, tuple[tuple[str, ...], str]]:
    return {name: (text.files, text.field) for name, text in texts(recipe).items()}


def tell_change(recipe: Recipe, run: Path, shards: AnyShards, say: Say) -> None:
    """Say whether the text is gone, or another than the run was trained on: it goes on with its own shards."""
    newest = checkpoint.folders(run)[0].name
    folder = next(iter(shards.sources.values())).folder
    goes_on = f"{run.name} goes on with what it was trained on, in {folder.parent if recipe.text.sources else folder}"
    if any(name.startswith("hub:") for name in recipe.text.names):  # unknown without asking the hub
        say(f"text: not read; {goes_on}")
        return
    changed = False
    for name, text in texts(recipe).items():
        each = shards.sources[name]
        try:
            changed |= has_changed(text, each.seen, each.manifest["text"], each.folder.parent.parent, Show(say, True))
        except LLMError as error:
            if not isinstance(error, TextError | RecipeError):
                raise
            say(f"text: {error} ({goes_on})")
            return
    if changed:
        say(f"text: changed since then; {goes_on}. To train on it as it is now: run=NAME from={run.name}/{newest}")
