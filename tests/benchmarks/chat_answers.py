"""Answers of a run that was trained on conversations: python tests/benchmarks/chat_answers.py [RUN] [--temperature 0.5] [--seed 1]

How many of 200 answers to held-out conversations end by themselves before the context is full, and ten exchanges in a row, as
`python -m llm.chat RUN --seed 1 --temperature 0.5` would have them. A prompt is a held-out conversation up to an answer: up to the
first one of each, then up to the second, and so on.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm.data.chat_template import ANSWER, template_of
from llm.data.shards import Split, of_run
from llm.inference.chat import Conversation
from llm.inference.generation import generate
from llm.inference.sampling import Sampling
from llm.run_folder.loaded_run import LoadedRun, open_run

PROMPTS, ROWS, TOKENS = 200, 20, 200
MESSAGES = (
    "Hello, how are you?", "What do you do for fun?", "Do you like music?", "What is your favorite food?", "Where are you from?",
    "Did you watch the game last night?", "I am so tired today.", "What are your plans for the weekend?", "Do you have any pets?", "Goodbye!",
)  # fmt: skip


def prompts_of(side: Split, most: int) -> list[list[int]]:
    """PROMPTS beginnings of at most `most` tokens, each up to where an answer begins."""
    found: list[tuple[int, int, list[int]]] = []
    for number, (begin, end) in enumerate(pairwise([*side.document_starts().tolist(), side.tokens])):
        is_answer = side.parts(begin, min(end, begin + most + 1)) == ANSWER
        begins = np.flatnonzero(is_answer[1:] & ~is_answer[:-1]) + 1
        found += [(turn, number, side.read(begin, begin + at).tolist()) for turn, at in enumerate(begins.tolist())]
    return [ids for *_, ids in sorted(found)[:PROMPTS]]


def ended(run: LoadedRun, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[bool]:
    """Whether each answer ends by itself before the context is full."""
    template, context, found = template_of(run.tokenizer), run.model.shape.context, []
    for low in range(0, len(prompts), ROWS):
        rows = prompts[low : low + ROWS]
        tokens = context - min(map(len, rows)) + 1
        said = list(generate(run.model, rows, tokens, sampling, seed + low, template.ends, template.banned))
        lengths = [sum(column[row] is not None for column in said) for row in range(len(rows))]
        found += [length <= context - len(row) for length, row in zip(lengths, rows, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    run, sampling = open_run(given.run), Sampling(temperature=given.temperature)
    conversation = Conversation(run)
    sides = [each.validation for each in of_run(run.folder).sources.values() if each.is_chat]
    prompts = prompts_of(Split.joined(sides), run.model.shape.context * 3 // 4)
    count = ended(run, prompts, sampling, given.seed)
    print(f"{run.name}: {sum(count)} of {len(count)} answers to held-out conversations end by themselves")
    for message in MESSAGES:
        seed = given.seed + len(conversation.messages)  # as llm.chat has it
        answer = "".join(conversation.answer(message, TOKENS, sampling, seed))
        print(f"> {message}\n{answer.strip()}")


if __name__ == "__main__":
    main()
