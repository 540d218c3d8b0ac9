"""python -m llm.prepare RECIPE: prepare a text for training. python -m llm.prepare --wiki FILE: write a text."""

from pathlib import Path

from llm.base import atomic_io
from llm.base.command import Parser
from llm.base.errors import RecipeError, TextError, run
from llm.config.packaged import load_recipe
from llm.config.schema import Text
from llm.data.sources import wiki_documents

MARKER = "<|endoftext|>"  # the line between documents in the file that --wiki writes
LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}


def write_wiki(path: Path, language: str, *, force: bool) -> None:
    """Write the packaged Wikipedia text to `path`, its documents separated by MARKER lines."""
    if path.exists() and not force:
        raise RecipeError(f"{path} is there already: name another file, or add --force to replace it")
    atomic_io.check_writable(path)
    atomic_io.write_bytes(path, f"{MARKER}\n".encode().join(wiki_documents(language)))
    print(f"{path}: {path.stat().st_size:,} bytes, lead sections of Wikipedia articles, with lines {MARKER} between")
    print("licence: CC BY-SA 4.0, the work of Wikipedia's authors: name them where you pass the text on")


def list_text(*texts: Text) -> None:
    """Print a line for each file of the texts. TextError, at the end, if some are refused."""
    from llm.data.documents import Corpus

    files = documents = size = refused = 0
    print(f"{'documents':>12}{'bytes':>16}  file")
    corpora = [Corpus(text) for text in texts]
    for corpus in corpora:
        for name, count, text_bytes, note in corpus.report():
            print(f"{count:12,}{text_bytes:16,}  {name}{f' ({note})' if note else ''}", flush=True)
            files, documents, size = files + 1, documents + count, size + text_bytes
            refused += note.startswith("refused")
    print(f"{documents:12,}{size:16,}  {files:,} file{'s' * (files != 1)}")
    if refused:
        raise TextError(f"{refused:,} of {files:,} files are refused: mend them as their lines say")
    for corpus in corpora:
        _ = corpus.is_chat  # TextError for texts and conversations in one


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    about = "Make a recipe's text ready for training: split it, train its tokenizer, write its token shards."
    parser = Parser("prepare", about)
    say = parser.add_argument
    parser.add_recipe(nargs="?")
    say("--verify", action="store_true", help="read the text again and check every byte of the shards")
    say("--new-tokenizer", action="store_true", help="train a new tokenizer and split the text anew")
    say("--list", action="store_true", help="only read the text: documents, bytes and what is left out of each file")
    say("--wiki", type=Path, metavar="FILE", help="instead write FILE: Wikipedia's lead sections, from the wiki extra")
    say("--language", choices=LANGUAGES, help="language of --wiki (en)")
    say("--force", action="store_true", help="let --wiki replace FILE")
    options = parser.parse_args(arguments)
    if (options.list or options.wiki) and (options.verify or options.new_tokenizer):
        raise RecipeError("--list and --wiki prepare no text: leave out --verify and --new-tokenizer")
    if options.wiki and (options.recipe or options.list):
        raise RecipeError("--wiki writes a text and reads none: leave out the recipe and --list")
    if not options.wiki and (options.force or options.language):
        raise RecipeError("--force and --language are for --wiki FILE")
    if options.wiki:
        write_wiki(options.wiki, LANGUAGES[options.language or "en"], force=options.force)
    elif options.recipe and options.list:
        from llm.data.mixed_pipeline import texts

        list_text(*texts(load_recipe(options.recipe, options.overrides)).values())
    elif options.recipe:
        from llm.config.resolving import with_steps
        from llm.data.mixture import tokens_per_epoch
        from llm.insight import hints
        from llm.interop.pretrained import prepare_for

        recipe = load_recipe(options.recipe, options.overrides)
        recipe, prepared = prepare_for(recipe, verify=options.verify, anew=options.new_tokenizer)
        tokens = tokens_per_epoch(recipe, prepared.shards)
        print(hints.of_text(with_steps(recipe, tokens), tokens, prepared.tokenizer.vocab_size))
    else:
        parser.error("name a recipe, or --wiki FILE")


if __name__ == "__main__":
    run(main)
