"""The READMEs: the first fits a terminal, and every command, key and file that any of them names is there."""

import re
import shlex
from pathlib import Path

from llm.config.reading import load
from llm.config.schema import flat
from tests.forks import ROOT

READMES = [*sorted(ROOT.glob("**/README.md")), ROOT / "recipes/experiments.md"]
COMMAND = re.compile(r"(?:python -m llm\.\w+|launch/train\.py|launch/slurm\.sh) [^`|]*")


def commands(readme: Path) -> list[str]:
    """Lines that start one of our commands, without their comments, from code blocks and from tables."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    return [found.partition(" #")[0] for line in text.splitlines() for found in COMMAND.findall(line)]


def test_the_readme_fits_a_terminal() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [line for line in readme.splitlines() if len(line) > 80]
    assert not re.search(r"[0-9a-f]{40}", readme)


def test_every_recipe_and_override_that_a_readme_names_is_taken() -> None:
    seen = 0
    for line in (line for readme in READMES for line in commands(readme) if "recipes/" in line):
        recipe, *overrides = [word for word in shlex.split(line) if word.endswith(".yaml") or "=" in word]
        load(ROOT / recipe, overrides)
        seen += 1
    assert seen >= 5


def test_every_command_and_option_that_a_readme_names_is_there() -> None:
    for line in (line for readme in READMES for line in commands(readme) if line.startswith("python")):
        module = ROOT / f"{line.split()[2].replace('.', '/')}.py"
        assert module.is_file(), line
        options = [word for word in re.findall(r"--[\w-]+", line) if word != "--help"]
        assert all(f'"{word}"' in module.read_text(encoding="utf-8") for word in options), line


def test_every_file_that_a_readme_names_is_there() -> None:
    named = r"`((?:llm|launch|recipes|tests)/[\w./]+\.(?:py|yaml|md|sh|ipynb))"
    files = {file for readme in READMES for file in re.findall(named, readme.read_text(encoding="utf-8"))}
    assert len(files) > 10 and not [file for file in files if not (ROOT / file).is_file()]


def test_every_key_is_explained() -> None:
    keys = flat(load(ROOT / "recipes/quickstart.yaml"))
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in keys)
