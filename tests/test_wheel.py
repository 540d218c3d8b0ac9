"""The wheel: every room, the recipes and the command `onetext` are in it, and it trains from an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.cli import COMMANDS
from tests.data.test_documents import needs_wiki
from tests.forks import ROOT


def test_every_room_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {f"llm.{path.parent.name}" for path in (ROOT / "llm").glob("*/__init__.py")}
    assert set(setup["tool"]["setuptools"]["packages"]) == rooms | {"llm", "llm._recipes"}


def test_every_command_module_has_a_subcommand() -> None:
    modules = {path.stem for path in (ROOT / "llm").glob("*.py")} - {"__init__", "api", "cli"}
    assert modules == set(COMMANDS)


def command(*words: str | Path, folder: Path, site: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_wiki
@pytest.mark.slow
def test_an_installed_wheel_trains_quickstart_from_an_empty_folder(tmp_path: Path) -> None:
    tree, site, empty = (tmp_path / name for name in ("tree", "site", "empty"))
    empty.mkdir()
    shutil.copytree(ROOT / "llm", tree / "llm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tree / "recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    command(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, folder=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    command(*pip, "install", "--no-deps", "--target", site, wheel, folder=tmp_path)
    assert (site / "llm/py.typed").is_file()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert (site / "llm/_recipes" / recipe.name).read_bytes() == recipe.read_bytes()

    onetext = site / "bin" / "onetext"
    for name in ("train", *COMMANDS):
        usage = command(onetext, name, "--help", folder=empty, site=site)
        assert name != "train" or "onetext train" in usage
    command(onetext, "train", "quickstart", "train.steps=4", "train.warmup=1", folder=empty, site=site)
    assert (empty / "runs/quickstart/checkpoints/step-000004/model.safetensors").is_file()
    where = "import llm; print(llm.__file__); print(llm.open_run().generate('My self Har', tokens=4))"
    assert str(site) in command(sys.executable, "-c", where, folder=empty, site=site)
    assert command(onetext, "sample", "--prompt", "My self Har", "--tokens", "4", folder=empty, site=site)
