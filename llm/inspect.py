"""python -m llm.inspect FILE ...: what a text holds, what to do about it, and what vocabularies would make of it."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from llm.base.command import Parser
from llm.base.errors import run

if TYPE_CHECKING:
    from llm.insight.text_survey import Finding, Survey

BAR, SAMPLE = 40, 72  # characters


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "inspect",
        "Survey a text before training: documents, lengths, scripts, duplicates and leaks across the validation "
        "split, markup, odd characters and lines; yardsticks and vocabularies. Nothing is written.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="as text.files: paths, patterns or named texts")
    parser.add_argument("--documents", default="auto", metavar="RULE", help="as text.documents (auto)")
    parser.add_argument("--field", default="text", help="field of a row or column of a table, as text.field (text)")
    parser.add_argument("--validation", default="5%", help="as text.validation (5%%)")
    parser.add_argument("--json", action="store_true", help="print JSON, with the numbers of similar documents")
    given = parser.parse_args(arguments)

    from llm.config.reading import value_of
    from llm.config.schema import Text
    from llm.data.progress import Show
    from llm.insight.text_survey import survey

    share = value_of("text.validation", given.validation, said="--validation")
    text = Text(files=tuple(given.files), documents=given.documents, field=given.field, validation=share)
    found = survey(text, Show(lambda line: print(line, file=sys.stderr), True))
    if given.json:
        print(json.dumps(asdict(found), ensure_ascii=True))
        return
    for line in lines(found):
        print(line)


def lines(found: "Survey") -> Iterator[str]:
    """The survey for people."""
    documents, size = sum(found.documents), sum(found.text_bytes)
    yield f"documents: {documents:,} ({found.rule}), {size / 1e6:,.2f} MB, {found.characters / 1e6:,.2f} M characters"
    yield (
        f"split by content: {found.documents[0]:,} for training, {found.documents[1]:,} held out, "
        f"{found.text_bytes[1] / size:.1%} of the bytes"
    )
    for note, count in sorted(found.notes.items()):
        yield f"{note}: {count:,}"
    yield f"lengths: median {found.median:,} bytes, longest {found.longest:,}; longest line {found.longest_line:,}"
    yield from _histogram(found.lengths)
    scripts = [f"{name} {share:.2%}" for name, share in found.scripts.items() if share >= 5e-5]
    yield f"scripts: {', '.join(scripts[:8]) or 'no letters'}"
    yield ""
    for finding in found.findings:
        yield from _finding(finding)
    if not found.findings:
        yield "no duplicates, markup, odd characters, long or repeated lines\n"
    if found.sampled["near duplicates in one of"] > 1:
        one_in = found.sampled["near duplicates in one of"]
        yield f"similar documents were sought in one of {one_in}, chosen by content: the counts are estimates\n"
    yield from _models(found)


def _histogram(lengths: list[int]) -> Iterator[str]:
    begin = next(at for at, count in enumerate(lengths) if count)
    for at, count in enumerate(lengths[begin:], begin):
        bar = "#" * max(int(BAR * count / max(lengths)), count > 0)
        yield f"  {1 << at:>9,} to {(2 << at) - 1:>9,} bytes {bar:<{BAR}} {count:,}".rstrip()


def _finding(finding: "Finding") -> Iterator[str]:
    share = f"{finding.share:.1%} of" if finding.share >= 0.005 else f"one in {1 / finding.share:,.0f}"
    yield f"{finding.name}: {finding.count:,}, {share} {finding.of}"
    for sample in finding.samples:
        plain = "".join(each if each.isprintable() else " " for each in sample)
        yield f"  | {plain[:SAMPLE]}{'...' if len(plain) > SAMPLE else ''}"
    yield f"  do: {finding.mend}"


def _models(found: "Survey") -> Iterator[str]:
    from llm.config.resolving import vocabulary_for

    sampled = found.sampled
    yield (
        f"yardsticks and vocabularies, trained on {sampled['trained on'] / 1e6:,.1f} MB, measured on "
        f"{sampled['measured on'] / 1e6:,.2f} MB held out"
    )
    for name, bits in found.yardsticks.items():
        yield f"  {name}: {bits:.3f} bits per byte"
    if not found.vocabularies:
        yield "  the text is too small for a vocabulary of 1,024 pieces: use more text"
        return
    yield "  in a model of quickstart's shape (192 wide, 4 layers, 256 tokens of context):"
    yield "  pieces  bytes a token  parameters  in embeddings  context in characters"
    for each in found.vocabularies:
        yield (
            f"  {each.pieces:>6,}  {each.bytes_per_token:>13.2f}  {each.parameters / 1e6:>8.2f} M  "
            f"{each.share:>14.0%}  {each.context:>21,}"
        )
    yield f"  begin with tokenizer.vocabulary=auto: {vocabulary_for(found.text_bytes[0]):,} pieces for so much text"


if __name__ == "__main__":
    run(main)
