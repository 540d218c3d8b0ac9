"""python -m llm.runs: the runs of a folder, one a row, the newest first."""

import time
from pathlib import Path

from llm.base.command import Parser
from llm.base.errors import LLMError, RecipeError, reason, run

HEADS = ("name", "state", "step", "size", "text", "bits per byte", "when")
LONGEST = (28, 12, 17, 9, 24, 13, 16)  # characters of each column


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        "runs", "List runs: state, step, size, text, best bits per byte, and when each was last written to."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of the runs (runs)")
    folder = parser.parse_args(arguments).runs
    if not folder.is_dir():
        from llm.run_folder.record import TRAIN_ONE

        mend = TRAIN_ONE if folder == Path("runs") else "name a folder of runs"
        raise RecipeError(f"{folder} is {'no folder' if folder.exists() else 'not there'}: {mend}")
    rows = sorted((_row(each) for each in folder.iterdir() if each.is_dir() and each.name[0] != "."), reverse=True)
    if not rows:
        print(f"there is no run in {folder} yet")
        return
    cells = [HEADS, *(cells for _, cells in rows)]
    cells = [tuple(_short(cell, most) for cell, most in zip(row, LONGEST, strict=False)) + row[7:] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADS))]
    for row in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=False)).rstrip())


def _row(folder: Path) -> tuple[float, tuple[str, ...]]:
    """When the run last changed, and its cells: one for each of HEADS, then a fault if there is one."""
    from llm.run_folder import record

    name = "".join(each if each.isprintable() else "?" for each in folder.name)
    try:
        if not record.is_run(folder):
            return folder.stat().st_mtime, (name, "not a run", *[""] * 5)
        found = record.read(folder)
        best, parameters, steps = found.best, found.parameters, found.planned_steps
        cells = (
            name,
            "damaged" if found.faults else found.state,
            f"{found.step:,}" + (f"/{steps:,}" if steps else ""),
            f"{parameters / 1e6:.2f} M" if parameters else "",
            found.text,
            f"{best['bits_per_byte']:.4f}" if best else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(found.changed)),
        )
        return found.changed, (*cells, *found.faults[:1])
    except (LLMError, OSError, ValueError) as error:  # such as a folder that may not be read
        return 0.0, (name, "damaged", *[""] * 5, reason(error))


def _short(cell: str, most: int) -> str:
    return cell if len(cell) <= most else cell[: most - 3] + "..."


if __name__ == "__main__":
    run(main)
