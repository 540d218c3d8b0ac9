"""Prepare a text: survey it, train its tokenizer and write its token shards, each once and cached by content.

The stages that the data passes through, and the module of each:

1. file -> chunks of text      sources.py, text_files.py   read, decompressed, checked to be UTF-8
2. chunks -> documents         documents.py                cut by a rule; their bytes are not altered
3. survey and split            survey.py                   digest and sizes; a hash of each document picks its side
4. tokenizer                   tokenizer.py                trained on the training side; hf_tokenizer.py for others'
5. documents -> blocks of ids  encoding.py                 in threads or processes; sharing.py: on several machines
6. blocks -> shards            shard_writer.py             Arrow files; shards.py maps them, one row of tokens
7. shards -> windows           shuffle.py, packing.py      the window at each position, a function of the seed
8. windows -> batches          batches.py                  the windows of a step and rank

1 to 6 happen here; 7 and 8 while a model is trained. The text is read once to survey it (twice if it is small) and
once to encode it, and not at all if its files still have the size, times and inode of the last survey.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm.base import atomic_io
from llm.base.errors import DiskError, RecipeError, RefusedError, TextError
from llm.config.resolving import vocabulary_for, with_vocabulary
from llm.config.schema import Evaluate, Recipe, Text
from llm.data import growth, packing, shard_writer, sharing
from llm.data import shards as sharding
from llm.data.chat_template import template_of
from llm.data.conversations import text_of
from llm.data.documents import MAX_DOCUMENT, Corpus
from llm.data.progress import Say, Show
from llm.data.reuse import JOURNAL, KnownTokens, link
from llm.data.shards import Shards
from llm.data.sharing import Shared, Team
from llm.data.sources import Source
from llm.data.survey import SAMPLE, Survey, cache_lock, check, cut_smaller, read_only, survey_of, survey_path, surveyed
from llm.data.tokenizer import MANIFEST, SETTINGS, SPACE, Tokenizer
from llm.distributed.threads import cores

LARGE = 16 << 20  # bytes of text from which it pays to start processes that encode it, and to share it
SHARDS = "these token shards"


@dataclass(frozen=True)
class Prepared:
    """A prepared text: its tokenizer and its token shards."""

    tokenizer: Tokenizer
    shards: Shards


def given_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of tokenizer.path. RecipeError where it would split one of tokenizer.terms."""
    tokenizer = Tokenizer.load(atomic_io.expanded(recipe.tokenizer.path or ""))
    for term in recipe.tokenizer.terms:
        if tokenizer.id_of(term.replace(" ", SPACE)) is None:
            fault = f"tokenizer.terms: {recipe.tokenizer.path} has no piece {term!r:.60}, so it would split it"
            raise RecipeError(f"{fault}: leave the term out, or train a tokenizer without tokenizer.path")
    return tokenizer


def prepare_text(
    recipe: Recipe,
    say: Say = print,
    verify: bool = False,
    tokenizer: Tokenizer | None = None,
    own: Source | None = None,
    anew: bool = False,
    team: Team | None = None,
) -> Prepared:
    """The recipe's text as tokens, from the cache where possible; `say` receives lines on progress and findings.

    A given `tokenizer` or `own` source replaces what the recipe names. `verify` reads the text again even if its
    files look unchanged, and checks every byte of the shards. A text that has grown since it was prepared keeps its
    tokenizer and the documents that it holds out, unless it is to be prepared `anew`. The machines of a `team` all call
    this, and encode a large text together.
    """
    cache = cache_of(recipe.text.cache or "data")
    show = Show(say, True)

    past = None if own or anew else growth.find(cache, recipe, tokenizer)
    given = tokenizer
    if tokenizer is None and recipe.tokenizer.path:
        tokenizer = given_tokenizer(recipe)
    grown = past and growth.follow(past, recipe.text, cache, show, verify=verify)
    corpus, survey, sample = (
        (grown.corpus, grown.survey, []) if grown else surveyed(recipe.text, cache, show, verify=verify, own=own)
    )
    _say_text(corpus, survey, recipe, say, own)
    made = None
    if tokenizer is None:
        folder = cache / "tokenizers" / grown.tokenizer if grown else tokenizer_folder(cache, recipe, survey)
        made = folder.name
        tokenizer = trained(recipe, survey, folder, say, lambda: sample or survey_of(corpus, survey.share, show)[1])
    lossy = "" if tokenizer.lossless else "; it does not give every text back byte for byte"
    say(f"tokenizer: {tokenizer.vocab_size:,} pieces{lossy}")

    old = growth.shards_of(past, cache, survey, tokenizer) if past and not verify else None
    shards = _sharded(corpus, survey, tokenizer, cache, show, old, team, verify=verify)
    shards.seen = corpus.seen
    if own is None:
        now = growth.Past(corpus.identity, corpus.most, asdict(survey), shards.folder.name, made or "")
        growth.record(cache, recipe, given, now)
        if recipe.tokenizer.vocabulary == "auto":  # found too by the number, which a run's recipe says
            growth.record(cache, with_vocabulary(recipe, tokenizer.vocab_size), given, now)
    if recipe.evaluate.also:
        shards.also = prepare_also(recipe, tokenizer, say, verify, team)
    train, validation = shards.train, shards.validation
    tokens, text_bytes = train.tokens + validation.tokens, train.text_bytes + validation.text_bytes
    if shards.is_chat:
        _say_windows(recipe, shards, say)
        return Prepared(tokenizer, shards)
    say(f"tokens: {_sides(train.tokens, validation.tokens)}, {text_bytes / tokens:.2f} bytes a token")
    if train.tokens <= recipe.model.context:
        mend = f", or at most model.context={train.tokens - 1}" if train.tokens > 2 else ""  # 2 is the least context
        names = ", ".join(recipe.text.files)
        raise TextError(
            f"{names}: {train.tokens:,} training tokens are fewer than one window of model.context + 1 = "
            f"{recipe.model.context + 1:,}: use more text{mend}"
        )
    return Prepared(tokenizer, shards)


def _say_text(corpus: Corpus, survey: Survey, recipe: Recipe, say: Say, own: Source | None) -> None:
    """Say what the text holds and what is left out. TextError or RecipeError where it holds too little, or no chat."""
    if corpus.repeated:
        more = f" (and {len(corpus.repeated) - 1:,} more)" if len(corpus.repeated) > 1 else ""
        say(f"text: {corpus.repeated[0]}{more}")
    if corpus.left_out:
        (name, reason), others = corpus.left_out[0], len(corpus.left_out) - 1
        more = f" (and {others:,} more: `--list` of llm.prepare names them)" if others else ""
        say(f"text: {name} is left out, as it {reason}{more}")
    check(survey, recipe.text, own)
    if recipe.train.on == "assistant" and not survey.is_chat:
        names = ", ".join(recipe.text.files)
        mend = "remove it, or name .jsonl rows of messages"
        raise RecipeError(f"train.on = assistant, but {names} holds no conversations: {mend}")
    left_out = "".join(f"; {what}: {count:,}" for what, count in sorted(survey.notes.items()))
    say(f"text: {_sides(*survey.documents)} documents; rule: {survey.rule}{left_out}")
    say(f"bytes: {_sides(*survey.text_bytes)}")
    if survey.share != recipe.text.validation:
        part = survey.text_bytes[1] / sum(survey.text_bytes)
        asked = f"text.validation = {recipe.text.validation:g} would leave too little to measure by"
        say(f"validation: {part:.1%} of the bytes, as {asked}")


def prepare_also(
    recipe: Recipe, tokenizer: Tokenizer, say: Say, verify: bool = False, team: Team | None = None
) -> Shards:
    """The texts of evaluate.also in the tokens of the run."""
    other = replace(recipe, text=also(recipe), evaluate=Evaluate(), train=replace(recipe.train, on="auto"))
    return prepare_text(other, say, verify, tokenizer, team=team).shards


def also(recipe: Recipe) -> Text:
    """The texts of evaluate.also, read as those of the run."""
    return replace(recipe.text, files=recipe.evaluate.also, sources=())


def last_shards(cache: Path, recipe: Recipe, tokenizer: Tokenizer | None) -> Shards | None:
    """The shards of the last preparation of the recipe's text, if its files are still those; as of growth.find."""
    past = growth.find(cache, recipe, tokenizer)
    if past is None or Corpus(recipe.text, past.most).identity != past.corpus:
        return None
    folder = cache / "shards" / past.shards
    return Shards.open(folder) if (folder / "manifest.json").is_file() else None


def find_shards(recipe: Recipe) -> Shards | None:
    """The recipe's shards if they were made before from its files as they are now; nothing is read, trained or written.

    None too for texts of the hub, which would have to be asked. TextError or RecipeError for names that lead nowhere.
    """
    cache, tokenizer = atomic_io.expanded(recipe.text.cache or "data"), recipe.tokenizer
    if any(name.startswith("hub:") for name in recipe.text.files):
        return None
    if shards := last_shards(cache, recipe, None):
        return shards
    most = MAX_DOCUMENT
    while (path := survey_path(cache, Corpus(recipe.text, most), recipe.text)).is_file():
        survey = Survey(**atomic_io.read_checksummed(path))
        if tokenizer.path:
            model = atomic_io.expanded(tokenizer.path)
        elif not (model := tokenizer_folder(cache, recipe, survey) / "tokenizer.model").is_file():
            return None
        _, found = _shards_folder(cache, survey, Tokenizer.load(model))
        if (found / "manifest.json").is_file():
            return Shards.open(found)
        less = cut_smaller(survey)
        if most <= less:
            return None
        most = less
    return None


def tokenizer_folder(cache: Path, recipe: Recipe, survey: Survey) -> Path:
    wanted = recipe.tokenizer
    size: Any = vocabulary_of(recipe, survey)
    if wanted.vocabulary == "auto":  # which may come to another number
        size = ["auto", size]
    key = atomic_io.digest_of([SETTINGS, SAMPLE, survey.sha256, survey.share, size, wanted.terms])
    return cache / "tokenizers" / key


def vocabulary_of(recipe: Recipe, survey: Survey) -> int:
    """The number of pieces to ask for. Under auto little text ends with fewer, a text of many letters with more."""
    wanted = recipe.tokenizer
    if wanted.vocabulary != "auto":
        return wanted.vocabulary
    return vocabulary_for(survey.text_bytes[0]) + len(wanted.terms)


def _shards_folder(cache: Path, survey: Survey, tokenizer: Tokenizer) -> tuple[dict[str, Any], Path]:
    """The inputs that decide the shards, and their folder, named by a digest of these."""
    about = {"text": survey.sha256, "validation": survey.share, "tokenizer": tokenizer.fingerprint}
    if survey.is_chat:
        about["template"] = template_of(tokenizer).fingerprint
    return about, cache / "shards" / atomic_io.digest_of([sharding.FORMAT, about])


def _say_windows(recipe: Recipe, shards: Shards, say: Say) -> None:
    """Say how conversations are packed. TextError where there is nothing to learn."""
    table = packing.table_of(recipe, shards.train)
    if not table.windows:
        names = ", ".join(recipe.text.files)
        raise TextError(f"{names}: no training conversation holds an answer: add messages of the assistant")
    say(f"tokens: {_sides(shards.train.tokens, shards.validation.tokens)}, {table.targets:,} of them to be learnt")
    cut = f"; {table.cut:,} conversations are longer and cut at a turn" if table.cut else ""
    cut += f"; {table.left_out:,} parts without an answer are left out" if table.left_out else ""
    say(f"windows: {len(table.windows):,} of {table.context:,} tokens, {table.fill:.0%} full{cut}")


def cache_of(name: str) -> Path:
    cache = atomic_io.expanded(name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RecipeError(f"text.cache = {name} cannot be a folder ({error.strerror}): name another place") from error
    return cache


def _sides(train: int, validation: int) -> str:
    return f"{train:,} train + {validation:,} validation"


def trained(recipe: Recipe, survey: Survey, folder: Path, say: Say, sample: Callable[[], list[bytes]]) -> Tokenizer:
    """The recipe's tokenizer, trained on the training side of the text or read from the cache."""
    wanted = recipe.tokenizer
    with cache_lock(folder, "this tokenizer", say):
        if not folder.is_dir():
            documents = [text_of(each) for each in sample()] if survey.is_chat else sample()
            sampled, whole = sum(map(len, documents)), survey.text_bytes[0]
            part = f"a sample of {sampled / 1e6:,.1f} MB of " if whole > SAMPLE else ""
            pieces, auto = vocabulary_of(recipe, survey), wanted.vocabulary == "auto"
            say(f"training a tokenizer of {pieces:,} pieces on {part}{whole / 1e6:,.1f} MB of text")
            tokenizer = Tokenizer.train(documents, vocab_size=pieces, terms=wanted.terms, as_fits=auto)
            if tokenizer.vocab_size != pieces:
                why = "so little text allows no more" if tokenizer.vocab_size < pieces else "its letters need more"
                say(f"vocabulary: {tokenizer.vocab_size:,} pieces, as {why}")
            with atomic_io.draft_folder(folder) as draft:
                tokenizer.save(draft, **asdict(wanted), text=survey.sha256, sampled_bytes=sampled)
        return kept_tokenizer(folder)


def kept_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder of the cache. RefusedError if it is damaged."""
    try:
        atomic_io.read_checksummed(folder / MANIFEST)
        return Tokenizer.load(folder / "tokenizer.model")
    except (RefusedError, RecipeError) as error:
        raise RefusedError(f"{error}: remove {folder} and prepare the text again") from error


def _sharded(
    corpus: Corpus, survey: Survey, tokenizer: Tokenizer, cache: Path, show: Show, old: Shards | None,
    team: Team | None, *, verify: bool,
) -> Shards:  # fmt: skip
    """The shards of this text, split and tokenizer; writing continues where an earlier call was killed.

    Tokens of `old` shards are not encoded again. A `team` encodes a large text together.
    """
    about, folder = _shards_folder(cache, survey, tokenizer)
    with ExitStack() as held:
        if team:
            found = {"the text's": folder.name[:12], "the tokenizer's": tokenizer.fingerprint[:12]}
            team, old = _together(team, found, folder, sum(survey.text_bytes) >= LARGE, old, held, show)
        if team is None:
            held.enter_context(cache_lock(folder, SHARDS, show.say))
        made = (team is None or team.writes) and (folder / "manifest.json").is_file()
        if made and not read_only(folder):
            atomic_io.sweep(folder)
            if (folder / JOURNAL).exists():  # a kill came between the manifest and its removal
                atomic_io.remove(folder / JOURNAL)
        if team or not made:
            _write(corpus, survey, tokenizer, folder, show, old, team, about, made=made)
        shards = Shards.open(folder, (verify or None) if made else False)
    sides = [shards.train, shards.validation]
    assert made or [side.documents for side in sides] == survey.documents, "a corpus gives the same or refuses"
    show.say(f"shards: {folder.parent}/{folder.name[:12]}...{' (made before)' if made else ''}")
    return shards


def _together(
    team: Team, made_of: dict[str, str], folder: Path, large: bool, old: Shards | None, held: ExitStack, show: Show
) -> tuple[Team | None, Shards | None]:
    """The team with its locks `held`, and the old shards if all have the same.

    None in its place where each machine encodes by itself: a text that is not `large`, or one that another process
    prepares, as two teams could wait for each other. GroupError if the text or the tokenizer is not the same.
    """
    with ExitStack() as tried:
        takes = cache_lock(folder, SHARDS, show.say, wait=False) if large and team.writes else nullcontext(large)
        mine = tried.enter_context(takes)
        found = sharing.told(team, [made_of, old and old.fingerprint, mine])
        sharing.agree(team, [each[0] for each in found])
        if not all(each[2] for each in found):
            return None, old
        held.enter_context(tried.pop_all())
    return team, old if all(each[1] == found[0][1] for each in found) else None


def _write(
    corpus: Corpus, survey: Survey, tokenizer: Tokenizer, folder: Path, show: Show, old: Shards | None,
    team: Team | None, about: dict[str, Any], *, made: bool,
) -> None:  # fmt: skip
    """Encode the text into shards in `folder`, alone, or with the machines of a team that lack them."""
    kept = growth.common(old, survey)
    writes, files = (team is None or team.writes) and not made, None
    if writes:
        _check_space(folder, sum(survey.text_bytes), tokenizer.vocab_size)
        if old and not (folder / JOURNAL).is_file():
            link(old, folder, kept)
        files = shard_writer.finished(folder)
    there = [done for done in sharing.told(team, files and shard_writer.counts(files)) if done]
    if not there:
        return  # every machine has them
    begin = [min(side) for side in zip(*there, strict=True)]
    about = {**about, "fingerprint": folder.name, "rule": survey.rule, "vocabulary": tokenizer.vocab_size}
    about["segments"] = [segment["sha256"] for segment in survey.segments]
    by_words = tokenizer.by_words and not survey.is_chat
    processes = cores() if by_words and cores() > 1 and sum(survey.text_bytes) >= LARGE else 0
    known = KnownTokens(old) if old else None
    place, before = growth.begin(survey, begin, kept)
    shared = Shared(team) if team else None
    written = shard_writer.write(
        corpus.documents(place=place), folder, tokenizer, val_fraction=survey.share, about=about, processes=processes,
        chat=survey.is_chat, files=files, begin=begin, before=before, known=known, shared=shared, writes=writes,
    )  # fmt: skip
    for _ in show.over(written, "encoding", sum(survey.text_bytes), int):
        pass
    if shared:
        sharing.told(team, None)  # the files of those that write for others are there
        parts = " + ".join(f"{size / 1e6:,.1f}" for size in shared.text_bytes)
        show.say(f"encoding: {parts} MB on {len(shared.text_bytes)} machines")


def _check_space(folder: Path, text_bytes: int, vocab_size: int) -> None:
    """DiskError if the shards would not fit, assuming two bytes of text per token; ordinary text has more."""
    there = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    needed = text_bytes // 2 * (2 if vocab_size <= 1 << 16 else 4) - there
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        fault = f"token shards in {folder} need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        mend = "make room, or name another place by text.cache=FOLDER, and run the same command again"
        raise DiskError(f"{fault}: {mend}")
