"""Prepare text.sources: each text by itself, all in the tokens of one tokenizer.

Where that has to be trained, its sample is drawn from all sources by bytes, whatever their weights: the documents with
the smallest hashes of all their training sides. So other weights leave tokenizer and shards as they are.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llm.base import atomic_io
from llm.base.errors import RecipeError, TextError
from llm.config.resolving import with_vocabulary
from llm.config.schema import Evaluate, Recipe, Text, TextSource
from llm.data import growth, pipeline
from llm.data.conversations import text_of
from llm.data.documents import fraction
from llm.data.progress import Say, Show
from llm.data.shards import AnyShards, MixedShards, Shards
from llm.data.sharing import Team
from llm.data.sources import Source, refuse_missing
from llm.data.survey import SAMPLE, Survey, check, read_only, survey_of, surveyed
from llm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A text or a mixture: its tokenizer and its token shards."""

    tokenizer: Tokenizer
    shards: AnyShards


def prepare(
    recipe: Recipe,
    say: Say = print,
    verify: bool = False,
    tokenizer: Tokenizer | None = None,
    own: Source | None = None,
    anew: bool = False,
    team: Team | None = None,
) -> Prepared:
    """As pipeline.prepare_text, of a text or of several sources."""
    if not recipe.text.sources:
        text = pipeline.prepare_text(recipe, say, verify, tokenizer, own, anew, team)
        return Prepared(text.tokenizer, text.shards)
    for name, named in texts(recipe).items():  # before any of them is read
        with _naming(name):
            refuse_missing(named)
    if tokenizer is None and recipe.tokenizer.path is None:
        tokenizer = (None if anew else _made_before(recipe)) or _trained(recipe, say, verify)
    found: dict[str, Shards] = {}
    for source in recipe.text.sources:

        def say_of(line: str, name: str = source.name) -> None:
            say(f"{name}: {line}")

        one = recipe_of_source(recipe, source)
        with _naming(source.name):
            prepared = pipeline.prepare_text(one, say_of, verify, tokenizer, anew=anew, team=team)
        tokenizer, found[source.name] = prepared.tokenizer, prepared.shards
    assert tokenizer is not None, "a recipe has a source"
    _tell_leaks(found, say)
    shards = MixedShards(found)
    if recipe.train.on == "assistant" and not shards.is_chat:
        mend = "remove it, or name .jsonl rows of messages"
        raise RecipeError(f"train.on = assistant, but no source holds conversations: {mend}")
    if recipe.evaluate.also:
        shards.also = pipeline.prepare_also(recipe, tokenizer, say, verify, team)
    return Prepared(tokenizer, shards)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors name the keys of this source."""
    try:
        yield
    except (TextError, RecipeError) as error:
        own = re.sub(r"\btext\.(?=(?:documents|validation|field)\b)", f"text.sources.{source}.", str(error))
        raise type(error)(own) from error


def _tell_leaks(found: dict[str, Shards], say: Say) -> None:
    """Say which documents that one source holds out are in another that holds out less, and are trained on there."""
    for name, ours in found.items():
        for other, theirs in found.items():
            if theirs.manifest["validation"] < ours.manifest["validation"]:
                both = np.isin(ours.validation.document_keys(), theirs.train.document_keys())
                if both.any():
                    fault = f"{both.sum():,} of its held-out documents are trained on as part of {other}"
                    say(f"{name}: {fault}, which holds out less: its bits per byte will look too good")


def recipe_of_source(recipe: Recipe, source: TextSource) -> Recipe:
    """The recipe of one source. Of conversations the answers are learnt unless train.on = all, of a text everything."""
    on = recipe.train.on if recipe.train.on == "all" else "auto"
    text = replace(source.text, cache=recipe.text.cache)
    return replace(recipe, text=text, evaluate=Evaluate(), train=replace(recipe.train, on=on))


def texts(recipe: Recipe) -> dict[str, Text]:
    """The recipe's texts by the names of their sources; a text without sources has none."""
    return {each.name: recipe_of_source(recipe, each).text for each in recipe.text.sources} or {"": recipe.text}


def find_shards(recipe: Recipe) -> AnyShards | None:
    """As pipeline.find_shards, of a text or of several sources."""
    if not recipe.text.sources:
        return pipeline.find_shards(recipe)
    cache = atomic_io.expanded(recipe.text.cache or "data")
    path = recipe.tokenizer.path
    tokenizer = Tokenizer.load(atomic_io.expanded(path)) if path else _made_before(recipe)
    if tokenizer is None or any(name.startswith("hub:") for name in recipe.text.names):
        return None
    found: dict[str, Shards] = {}
    for source in recipe.text.sources:
        # As `prepare` records them: the first under the path, the others under the tokenizer that it gave.
        shards = pipeline.last_shards(
            cache, recipe_of_source(recipe, source), None if path and not found else tokenizer
        )
        if shards is None:
            return None
        found[source.name] = shards
    return MixedShards(found)


def _record(cache: Path, recipe: Recipe) -> Path:
    """Where the cache remembers which tokenizer the texts of these names got, so that it stays when they grow."""
    wanted = recipe.tokenizer
    names = [growth.names_of(text) for text in texts(recipe).values()]
    return cache / "texts" / f"{atomic_io.digest_of(['sources', names, wanted.vocabulary, wanted.terms])}.json"


def _made_before(recipe: Recipe) -> Tokenizer | None:
    cache = atomic_io.expanded(recipe.text.cache or "data")
    record = _record(cache, recipe)
    if not record.is_file():
        return None
    folder = cache / "tokenizers" / str(atomic_io.read_checksummed(record)["tokenizer"])
    return pipeline.kept_tokenizer(folder) if folder.is_dir() else None


def _trained(recipe: Recipe, say: Say, verify: bool) -> Tokenizer:
    """One tokenizer of all sources, trained or from the cache."""
    cache, show = pipeline.cache_of(recipe.text.cache or "data"), Show(say, True)
    found = []
    for name, text in texts(recipe).items():
        with _naming(name):
            corpus, survey, drawn = surveyed(text, cache, show, verify=verify)
            check(survey, text, None)
        found.append((corpus, survey, drawn))

    def sample() -> list[bytes]:
        drawn = [
            (fraction(document), text_of(document) if survey.is_chat else document)
            for corpus, survey, drawn in found
            for document in drawn or survey_of(corpus, survey.share, show)[1]
        ]
        kept, size = [], 0
        for _, document in sorted(drawn, key=lambda each: each[0]):
            size += len(document)
            if size > SAMPLE:
                break
            kept.append(document)
        return kept

    joint = _joint([survey for _, survey, _ in found])
    folder = pipeline.tokenizer_folder(cache, recipe, joint)
    tokenizer = pipeline.trained(recipe, joint, folder, say, sample)
    as_recorded = with_vocabulary(recipe, tokenizer.vocab_size)  # by a run
    for known in (recipe, as_recorded):
        if not read_only(record := _record(cache, known)):
            atomic_io.write_checksummed(record, {"tokenizer": folder.name})
    return tokenizer


def _joint(surveys: list[Survey]) -> Survey:
    """The inputs that decide the tokenizer of several texts."""
    documents, text_bytes = ([sum(column) for column in zip(*sizes, strict=True)] for sizes in (
        [each.documents for each in surveys], [each.text_bytes for each in surveys]))  # fmt: skip
    digest = atomic_io.digest_of([[each.sha256, each.share] for each in surveys])
    return Survey(digest, "", 0.0, documents, text_bytes, {})
