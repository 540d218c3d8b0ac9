"""Each launcher once for real, and the lines that quietly start another number of processes than was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm import checkpoint
from tests.forks import ROOT, write_recipe, write_text

BIN = Path(sys.executable).parent
ACCELERATE = (BIN / "accelerate", "launch")


def launch(folder: Path, *line: object, **changes: object) -> subprocess.CompletedProcess[str]:
    recipe = write_recipe(folder, write_text(folder / "text.txt"), **changes)
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = clean | {"HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    words = [*map(str, line), str(ROOT / "launch/train.py"), str(recipe)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


LINES = {
    "torchrun": (BIN / "torchrun", "--nproc_per_node", 2, "--master_port", 29611),
    "accelerate": (*ACCELERATE, "--multi_gpu", "--num_processes", 2, "--main_process_port", 29612),
    "configured": (*ACCELERATE, "--config_file", ROOT / "launch/cpu_processes.yaml", "--main_process_port", 29613),
    "fsdp": (
        *ACCELERATE,
        *("--config_file", ROOT / "launch/fsdp.yaml", "--num_processes", 2, "--main_process_port", 29614),
    ),
}


@pytest.mark.parametrize(
    "name", ["torchrun", "accelerate", *(pytest.param(each, marks=pytest.mark.slow) for each in ("configured", "fsdp"))]
)
def test_a_launcher_starts_two_processes(tmp_path: Path, name: str) -> None:
    ended = launch(tmp_path, *LINES[name])
    assert ended.returncode == 0, ended.stderr
    newest = checkpoint.newest(tmp_path / "runs/tiny", print)
    assert newest is not None and newest.manifest["machine"]["world"] == 2
    assert newest.manifest["machine"]["machine.shard"] == ("full" if name == "fsdp" else "none")


@pytest.mark.parametrize("told", ["--num_processes 2", pytest.param("config", marks=pytest.mark.slow)])
def test_a_line_that_quietly_starts_one_process_is_refused(tmp_path: Path, told: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "launch/cpu_processes.yaml").read_text().replace("MULTI_GPU\n", "MULTI_CPU\n"))
    words = ("--cpu", "--num_processes", 2) if told != "config" else ("--config_file", config)
    ended = launch(tmp_path, *ACCELERATE, *words)
    assert ended.returncode != 0
    (line,) = [each for each in ended.stderr.splitlines() if each.startswith("error: ")]
    assert "2 processes were asked for" in line and "--multi_gpu --num_processes 2" in line
    assert "status 6" in ended.stderr or "exit status 6" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_one_line_of_accelerates_ends_in_our_error_alone(tmp_path: Path) -> None:
    quiet = (*ACCELERATE, "-q", "--config_file", ROOT / "launch/one_gpu.yaml")
    ended = launch(tmp_path, *quiet, **{"train.stepz": 3})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: train.stepz: did you mean train.steps?\n"
