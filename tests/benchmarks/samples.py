"""How a run's samples read: python tests/benchmarks/samples.py RUN [RUN ...] [--seed 1], with the options of llm.sample

Each run continues the first three words of 50 held-out documents. Printed are, of the first 400 characters of each continuation,
the share of words that its text never has, on either side, and the share of runs of four words that stood in the sample before.
"""

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm.base.command import Parser
from llm.data.shards import Split, of_run
from llm.inference.generation import continuations
from llm.inference.sampling import Sampling, add_sampling, sampling_of
from llm.run_folder.loaded_run import LoadedRun, open_run

PROMPTS, WORDS, TOKENS, CHARACTERS = 50, 3, 200, 400
WORD = re.compile(r"[^\W\d_]+")


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def documents(run: LoadedRun, side: Split) -> list[str]:
    bounds = [*side.document_starts().tolist(), side.tokens]
    return [run.tokenizer.decode(side.read(begin, end).tolist()).strip() for begin, end in pairwise(bounds)]


def samples(run: LoadedRun, held_out: list[str], sampling: Sampling, seed: int) -> list[str]:
    """The prompts with their continuations. The last word may be cut and is left out."""
    chosen = sorted(held_out)[:: max(1, len(held_out) // PROMPTS)][:PROMPTS]
    prompts = [" ".join(text.split()[:WORDS]) for text in chosen]
    ids = [[run.tokenizer.bos, *run.tokenizer.encode(prompt)] for prompt in prompts]
    said = continuations(run.model, run.tokenizer, ids, TOKENS, sampling, seed)
    return [(prompt + text[:CHARACTERS]).rpartition(" ")[0] for prompt, text in zip(prompts, said, strict=True)]


def repeated(text: str, size: int = 4) -> tuple[int, int]:
    """Runs of `size` words that stood in the text before, and all of them."""
    said = words(text)
    runs = [tuple(said[at : at + size]) for at in range(len(said) - size + 1)]
    return len(runs) - len(set(runs)), len(runs)


def main() -> None:
    parser = Parser("samples", str(__doc__), prog="samples.py", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seed", type=int, default=1)
    add_sampling(parser)
    given = parser.parse_args()
    for name in given.runs:
        run = open_run(name)
        shards = list(of_run(run.folder).sources.values())
        held_out = [text for each in shards for text in documents(run, each.validation)]
        known = {word for each in shards for text in documents(run, each.train) for word in words(text)}
        known.update(word for text in held_out for word in words(text))
        texts = samples(run, held_out, sampling_of(given), given.seed)
        said = [word for text in texts for word in words(text)]
        unknown = sum(word not in known for word in said) / len(said)
        again, runs = (sum(column) for column in zip(*map(repeated, texts), strict=True))
        print(f"{run.name}: {unknown:.2%} of {len(said):,} words unknown, {again / runs:.2%} of runs of four repeated")


if __name__ == "__main__":
    main()
