"""python -m llm.verify RECIPE: does it resume to the bit on this machine? python -m llm.verify RUN: is it whole?"""

from pathlib import Path

from llm.base.command import OVERRIDES_HELP, Parser
from llm.base.errors import RecipeError, RefusedError, run
from llm.config import packaged


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "verify",
        "A recipe: train some steps of it whole, stopped and resumed, in other micro-batches and on two processes, and "
        "compare. A run: read every file of it again, against its sha256.",
    )
    add = parser.add_argument
    add("what", metavar="RECIPE|RUN", help="a recipe (.yaml, or the name of a packaged one), or a run under runs/")
    add("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES_HELP)
    parser.add_number("--steps", default=8, least=4, help="steps to train each time (default 8)")
    given = parser.parse_args(arguments)
    recipe = given.what if given.what.endswith((".yaml", ".yml")) else packaged.names().get(given.what)
    if recipe and not (Path("runs") / given.what).is_dir():
        from llm.training.proof import verify_recipe

        verdicts = verify_recipe(Path(recipe), given.overrides, given.steps)
    elif given.overrides:
        raise RecipeError(
            f"{given.overrides[0]}: overrides are for a recipe, and {given.what} names a run: leave them out"
        )
    else:
        from llm.run_folder.verification import verify_run

        verdicts = verify_run(given.what)
    for verdict in verdicts:
        fault = f": {verdict.fault}" if verdict.fault else ""
        print(f"{'broken' if verdict.fault else 'kept':7}{verdict.promise}{fault}")
    if broken := sum(bool(verdict.fault) for verdict in verdicts):
        raise RefusedError(f"{broken} of {len(verdicts)} promises are broken")


if __name__ == "__main__":
    run(main)
