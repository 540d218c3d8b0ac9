"""python -m llm.evaluate [RUN]: loss and bits per byte of a text, preferences in sentence pairs, lm-eval tasks."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from llm.base.command import MEAN_HELP, Parser
from llm.base.errors import RecipeError, run

if TYPE_CHECKING:
    from llm.inference.scoring import EncodedText, Score
    from llm.run_folder.loaded_run import LoadedRun


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "evaluate",
        "Loss, bits per byte and perplexity of a run, over its validation side or over texts of your own; or how often "
        "it prefers the good sentence of a pair; or tasks of lm-evaluation-harness.",
    )
    parser.add_run()
    add = parser.add_argument
    add("--mean", action="append", default=[], metavar="RUN", help=MEAN_HELP)
    add("--text", action="append", metavar="FILE", help="a text, conversations, glob or name; not the validation side")
    add("--alone", action="store_true", help="each document alone, as lm-eval reads them, not joined")
    add("--yardsticks", action="store_true", help="also the bits per byte of gzip, xz and a byte 5-gram on that text")
    add("--pairs", type=Path, metavar="FILE", help="GOOD, a tab and BAD on a line, or .jsonl with good and bad")
    add("--tasks", metavar="NAME,...", help="tasks of lm-eval, run on the checkpoint's folder itself")
    add("--task-folder", type=Path, metavar="FOLDER", help="folder with tasks of your own, as .yaml")
    add("--int8", action="store_true", help="score the text as `sample --int8` reads it: what rounding costs")
    parser.add_number("--rows", default=8, least=1, help="windows at once (default 8)")
    given = parser.parse_args(arguments)
    if given.tasks is not None and not given.tasks.strip(", "):
        raise RecipeError("--tasks is empty: name tasks of lm-eval")
    if given.task_folder and not given.tasks:
        raise RecipeError("--task-folder is for --tasks: name those in it")
    if given.int8 and (given.pairs or given.tasks):
        raise RecipeError("--int8 is for texts: leave out --pairs and --tasks")
    if (given.alone or given.yardsticks) and (given.pairs or given.tasks) and not given.text:
        raise RecipeError("--alone and --yardsticks are for texts: name one with --text, or leave them out")
    if given.mean and given.tasks:
        raise RecipeError("--tasks reads the folder of one run: leave out --mean")
    from llm.inference import scoring
    from llm.inference.fast_decode import prepare_weights
    from llm.run_folder.loaded_run import open_mean

    opened = open_mean(given.run, given.mean)
    if given.int8:
        prepare_weights(opened.model, int8=True)
    print(f"run                   {opened.name}{', in int8' if given.int8 else ''}")
    if given.pairs:
        right, count = scoring.count_preferred(opened, scoring.read_pairs(given.pairs), given.rows)
        share = f"{right:,} of {count:,}, {right / count:.2%}"
        print(f"pairs                 {given.pairs.name}: the good one is likelier in {share}")
    if given.tasks:
        from llm.interop.lm_eval_harness import run_tasks

        for line in run_tasks(opened, given.tasks.split(","), given.task_folder, given.rows):
            print(line)
    own = not (given.text or given.pairs or given.tasks)
    if own and (opened.is_chat or opened.recipe.text.sources):
        if given.yardsticks or given.alone:
            raise RecipeError("--yardsticks and --alone are for texts: name one with --text")
        for _, title, score in scoring.score_held_out(opened, given.rows):
            print_score(title, score)
    elif given.text or own:
        text = scoring.encode_files(opened, given.text) if given.text else scoring.validation_text(opened)
        if text.is_chat and (given.yardsticks or given.alone):
            raise RecipeError(f"--yardsticks and --alone are for texts, and {text.name} holds conversations")
        score = scoring.score(opened, text, given.rows, alone=given.alone)
        kind = "conversations, their answers" if text.is_chat else "documents"
        each = ", each alone" if given.alone else ""
        print_score(f"{text.name}: {len(text.documents):,} {kind}{each}", score)
        if given.yardsticks:
            print_yardsticks(opened, text, score)


def print_score(name: str, score: "Score") -> None:
    print(
        f"text                  {name}, {score.size:,} bytes, {score.targets:,} targets\n"
        f"loss                  {score.loss:.4f} nats a token\n"
        f"bits per byte         {score.bits_per_byte:.4f}\n"
        f"perplexity a token    {score.token_perplexity:,.2f}\n"
        f"perplexity a word     {score.word_perplexity:,.2f}"
    )


def print_yardsticks(opened: "LoadedRun", text: "EncodedText", score: "Score") -> None:
    """Print the bits per byte of general compressors that were trained on the end of the run's training side."""
    from llm.data.shards import of_run
    from llm.insight.baselines import training_text, yardsticks

    learnt = training_text(of_run(opened.folder), opened.tokenizer)
    print("yardsticks            bits per byte, after reading the training side")
    found = yardsticks(learnt, b"".join(text.documents)).items()
    for name, bits in chain(found, [("this run", score.bits_per_byte)]):
        print(f"  {name:<19} {bits:.4f}")


if __name__ == "__main__":
    run(main)
