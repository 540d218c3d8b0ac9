"""Prepare text.sources: each text by itself, all in the tokens of one tokenizer.

Where that has to be trained, its sample is drawn from all sources by bytes, whatever their weights: the documents with
the smallest hashes of all their training sides. So other weights leave tokenizer and shards as they are.
"""

from dataclasses import dataclass, replace

from llm.base import atomic_io
from llm.base.errors import RecipeError
from llm.config.schema import Evaluate, Recipe, Text, TextSource
from llm.data import pipeline
from llm.data.conversations import text_of
from llm.data.documents import Corpus, fraction
from llm.data.pipeline import Survey
from llm.data.progress import Say, Show
from llm.data.shards import AnyShards, MixedShards, Shards
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A text or a mixture: its tokenizer and its token shards."""

    tokenizer: Tokenizer
    shards: AnyShards


def prepare(
    recipe: Recipe,
    say: Say = print,
    progress: bool = True,
    verify: bool = False,
    tokenizer: Tokenizer | None = None,
    own: Source | None = None,
) -> Prepared:
    """As pipeline.prepare, of a text or of several sources."""
    if not recipe.text.sources:
        text = pipeline.prepare(recipe, say, progress, verify, tokenizer, own)
        return Prepared(text.tokenizer, text.shards)
    if tokenizer is None and recipe.tokenizer.path is None:
        tokenizer = _trained(recipe, say, progress, verify)
    found: dict[str, Shards] = {}
    for source in recipe.text.sources:

        def say_of(line: str, name: str = source.name) -> None:
            say(f"{name}: {line}")

        prepared = pipeline.prepare(alone(recipe, source), say_of, progress, verify, tokenizer)
        tokenizer, found[source.name] = prepared.tokenizer, prepared.shards
    assert tokenizer is not None, "a recipe has a source"
    shards = MixedShards(found)
    if recipe.train.on == "assistant" and not shards.is_chat:
        mend = "remove it, or name .jsonl rows of messages"
        raise RecipeError(f"train.on = assistant, but no source holds conversations: {mend}")
    if recipe.evaluate.also:
        plain = replace(recipe.text, files=recipe.evaluate.also, sources=())
        other = replace(_of_text(recipe, plain), train=replace(recipe.train, on="auto"))
        shards.also = pipeline.prepare(other, say, progress, verify, tokenizer).shards
    return Prepared(tokenizer, shards)


def alone(recipe: Recipe, source: TextSource) -> Recipe:
    """The recipe of one source. Of conversations the answers are learnt unless train.on = all, of a text everything."""
    on = recipe.train.on if recipe.train.on == "all" else "auto"
    text = replace(source.text, cache=recipe.text.cache)
    return replace(_of_text(recipe, text), train=replace(recipe.train, on=on))


def _of_text(recipe: Recipe, text: Text) -> Recipe:
    return replace(recipe, text=text, evaluate=Evaluate())


def find_shards(recipe: Recipe) -> AnyShards | None:
    """As pipeline.find_shards, of a text or of several sources."""
    if not recipe.text.sources:
        return pipeline.find_shards(recipe)
    cache, texts = atomic_io.expanded(recipe.text.cache or "data"), _texts(recipe)
    if any(name.startswith("hub:") for name in recipe.text.names):
        return None
    if not all(pipeline._survey_path(cache, Corpus(text), text).is_file() for text in texts):
        return None
    surveys = [pipeline.surveyed(text, cache, Show(_quiet, False), verify=False)[1] for text in texts]
    model = pipeline._tokenizer_folder(cache, recipe, _joint(surveys)) / "tokenizer.model"
    model = atomic_io.expanded(recipe.tokenizer.path) if recipe.tokenizer.path else model
    if not model.is_file():
        return None
    tokenizer = Tokenizer.load(model)
    folders = [pipeline._shards_folder(cache, survey, tokenizer)[1] for survey in surveys]
    if not all((folder / "manifest.json").is_file() for folder in folders):
        return None
    names = [source.name for source in recipe.text.sources]
    return MixedShards({name: Shards.open(folder) for name, folder in zip(names, folders, strict=True)})


def _quiet(line: str) -> None:
    pass


def _texts(recipe: Recipe) -> list[Text]:
    return [alone(recipe, source).text for source in recipe.text.sources]


def _trained(recipe: Recipe, say: Say, progress: bool, verify: bool) -> Tokenizer:
    """One tokenizer of all sources, trained or from the cache."""
    cache, show = pipeline._cache(recipe.text.cache or "data"), Show(say, progress)
    found = []
    for text in _texts(recipe):
        corpus, survey, drawn = pipeline.surveyed(text, cache, show, verify=verify)
        pipeline._check(survey, text, None)
        found.append((corpus, survey, drawn))

    def sample() -> list[bytes]:
        drawn = [
            (fraction(document), text_of(document) if survey.is_chat else document)
            for corpus, survey, drawn in found
            for document in drawn or pipeline._survey(corpus, survey.share, show)[1]
        ]
        kept, size = [], 0
        for _, document in sorted(drawn, key=lambda each: each[0]):
            size += len(document)
            if size > pipeline.SAMPLE:
                break
            kept.append(document)
        return kept

    return pipeline._trained(recipe, _joint([survey for _, survey, _ in found]), cache, say, sample)


def _joint(surveys: list[Survey]) -> Survey:
    """What the tokenizer of several texts depends on."""
    documents, text_bytes = ([sum(column) for column in zip(*sizes, strict=True)] for sizes in (
        [each.documents for each in surveys], [each.text_bytes for each in surveys]))  # fmt: skip
    digest = atomic_io.digest_of([[each.sha256, each.share] for each in surveys])
    return Survey(digest, "", 0.0, documents, text_bytes, {})
