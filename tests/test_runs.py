"""`python -m llm.runs`: every folder under runs/ is one row, whatever is in it, and torch is not imported for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm.base import atomic_io
from llm.base.errors import RecipeError
from llm.config.reading import load
from llm.runs import main
from tests.forks import ROOT

RECIPE = "run: {name}\ntext: {{files: [/somewhere/my.txt]}}\ntrain: {{steps: 20}}\n"
LINES = [{"step": 0, "planned_steps": 20, "planned_seconds": 9.0, "parameters": 2_560_000},
         {"step": 10, "loss": 3.0}, {"step": 10, "val_loss": 3.1, "bits_per_byte": 1.7318, "best": True},
         {"step": 20, "val_loss": 3.2, "bits_per_byte": 1.8}]  # fmt: skip


def a_run(runs: Path, name: str, status: object, lines: object = LINES, at: int = 0) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(name=name))
    (folder / "status.json").write_text(json.dumps(status))
    text = "".join(json.dumps(line) + "\n" for line in lines)  # type: ignore[attr-defined]
    (folder / "metrics.jsonl").write_text(text)
    os.utime(folder / "metrics.jsonl", (1_700_000_000 + at, 1_700_000_000 + at))
    return folder


def test_a_run_for_a_time_has_the_steps_that_it_was_planned_with_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path, "timed", {"status": 0})
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"steps: *\d+", "hours: 1", recipe))
    assert load(folder / "recipe.yaml").train.hours == 1
    for plan, shown in (([[0, 114], [9, 30]], "20/30"), ([[0, 0]], "20/20"), (3, "20/20"), ([[0, "a"]], "20/20")):
        atomic_io.write_checksummed(folder / "plan.json", {"plan": plan})
        assert shown in rows(tmp_path, capsys)["timed"]


def rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    main(["--runs", str(runs)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["name", "state", "step", "size", "text", "bits", "per", "byte", "when"]
    return {row.split()[0]: row for row in out[1:]}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"status": 0, "message": "finished"}, "finished"),
        ({"status": 75, "message": "stopped"}, "stopped"),
        ({"status": 3, "message": "diverged"}, "diverged"),
        ({"status": 1, "message": "ValueError"}, "failed"),
        ({"status": None, "message": "running", "process": os.getpid()}, "running"),
        ({"status": None, "message": "running", "process": 2**22 + 1}, "killed"),  # above Linux's largest
        ({"status": None, "message": "running", "process": "1; rm"}, "killed"),
        ({"status": [], "message": 5}, "unknown"),
        ([], "unknown"),
    ],
)
def test_a_run_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], status: object, state: str) -> None:
    a_run(tmp_path, "mine", status)
    row = rows(tmp_path, capsys)["mine"]
    assert row.split()[1:7] == [state, "20/20", "2.56", "M", "my.txt", "1.7318"]


def test_the_newest_is_first_and_a_damaged_or_foreign_folder_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path, "old", {"status": 0})
    a_run(tmp_path, "new", {"status": 0}, at=60)
    a_run(tmp_path, "torn", {"status": 0})
    (tmp_path / "torn/metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n{"step": 5, "lo')
    (tmp_path / "torn/status.json").write_text("{")
    a_run(tmp_path, "odd", {"status": 0}, [{"step": -1}, {"step": "x"}, {"step": 3, "bits_per_byte": "low", "val_loss": []},
                                           {"step": 10**30}, [], "line"])  # fmt: skip
    a_run(tmp_path, "keys", {"status": 0})
    (tmp_path / "keys/recipe.yaml").write_text("a: [")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "\x1b[31mred").mkdir()
    (tmp_path / "a file.txt").touch()
    found = rows(tmp_path, capsys)
    assert len(found) == 7 and [name for name in found if name in ("old", "new")] == ["new", "old"]
    assert "damaged" in found["torn"] and "status.json is damaged" in found["torn"] and " 4/20 " in found["torn"]
    assert "damaged" in found["keys"] and "recipe.yaml" in found["keys"]
    assert found["odd"].split()[1:3] == ["finished", "3/20"]
    assert found["foreign"].split()[1:] == ["not", "a", "run"] and "?[31mred" in found


def test_no_folder_is_one_line_and_an_empty_one_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="none is not there: name a folder of runs"):
        main(["--runs", str(tmp_path / "none")])
    with pytest.raises(RecipeError, match="is no folder"):
        main(["--runs", __file__])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"runs is not there: train one with `python launch"):
        main([])
    main(["--runs", str(tmp_path)])
    assert capsys.readouterr().out == f"there is no run in {tmp_path} yet\n"


def test_torch_is_not_imported(tmp_path: Path) -> None:
    a_run(tmp_path, "mine", {"status": 0})
    code = f"import sys, llm.runs; llm.runs.main(['--runs', {str(tmp_path)!r}]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
