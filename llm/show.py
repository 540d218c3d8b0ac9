"""python -m llm.show [RUN] --step N: the texts that a step read. python -m llm.show A B: where two runs diverge."""

from llm.base.command import NAMED, Parser
from llm.base.errors import RecipeError, harmless, run


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "show",
        "With one run: the texts that one step read, from the recipe alone. With two: the first step at which they "
        "diverge, and the keys of their recipes that differ.",
    )
    parser.add_argument(
        "runs", nargs="*", default=[], metavar="RUN", help=f"{NAMED}; default, with --step: the last one"
    )
    parser.add_number("--step", least=1, help="the step to show, counted as the run's messages count: 1 is the first")
    parser.add_number("--world", default=0, help="split the batch among this many processes (default: the run's)")
    parser.add_number("--characters", default=300, help="characters to show of each text (default 300; 0: all)")
    given = parser.parse_args(arguments)
    if len(given.runs) > 2 or (len(given.runs) < 2) != (given.step is not None):
        raise RecipeError("name one run, or none for the last, and --step N; or two runs")
    if given.step is None and given.world:
        raise RecipeError("--world is for --step: leave it out to compare two runs")
    from llm.run_folder.loaded_run import find
    from llm.run_folder.step_texts import step_texts
    from llm.run_folder.trace import compare_runs

    folders = [find(name)[0] for name in given.runs or [None]]
    lines = step_texts(folders[0], given.step, given.world, given.characters) if given.step else compare_runs(*folders)
    for line in lines:
        print(harmless(line))


if __name__ == "__main__":
    run(main)
