"""Each launcher once for real, and the lines that quietly start another number of processes than was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.base.errors import GroupError
from llm.distributed.process import place
from llm.run_folder import checkpoint
from tests.forks import ROOT, digest, ended, run, start, train, write_recipe, write_text

BIN = Path(sys.executable).parent
ACCELERATE = (BIN / "accelerate", "launch")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """Digest of a run that no launcher started."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(train(write_recipe(folder, text)), folder).status == 0
    return digest(folder)


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
    "name", ["accelerate", *(pytest.param(each, marks=pytest.mark.slow) for each in ("torchrun", "configured", "fsdp"))]
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


ENVIRONMENTS = {
    "RANK=1": "RANK = 1",
    "RANK=0": "without WORLD_SIZE",
    "RANK=abc": "RANK = abc",
    "LOCAL_RANK=0": "LOCAL_RANK = 0",
    "LOCAL_WORLD_SIZE=2": "LOCAL_WORLD_SIZE = 2",
    "WORLD_SIZE=2": "without RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT, MASTER_ADDR",
    "WORLD_SIZE=x": "WORLD_SIZE = x",
    "WORLD_SIZE=0": "WORLD_SIZE = 0",
    "WORLD_SIZE=1 RANK=1": "RANK = 1",
    "WORLD_SIZE=1 LOCAL_RANK=-1": "LOCAL_RANK = -1",
    "WORLD_SIZE=2 RANK=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1": "RANK = 2",
    "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=1": "LOCAL_RANK = 1",
    "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=1": "LOCAL_WORLD_SIZE = 4",
    "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999": "did not meet",
    "PMI_SIZE=2": "PMI_SIZE = 2",
    "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1": "OMPI_COMM_WORLD_SIZE = 2",
    "MV2_COMM_WORLD_SIZE=x": "MV2_COMM_WORLD_SIZE = x",
    "SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0": "launch/slurm.sh",
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_half_a_launch_is_refused_in_one_line(
    tmp_path: Path, text: Path, environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(each.split("=") for each in environment.split())
    if "99999" not in environment:
        with monkeypatch.context() as changed, pytest.raises(GroupError, match=ENVIRONMENTS[environment]):
            for name, value in given.items():
                changed.setenv(name, value)
            place()
    if environment in ("RANK=1", "PMI_SIZE=2") or "99999" in environment:
        done = ended(start(train(write_recipe(tmp_path, text)), tmp_path, given), tmp_path)
        assert done.status == 6 and len(done.err.splitlines()) == 1, done.err
        assert ENVIRONMENTS[environment] in done.err and not list(tmp_path.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 PMI_SIZE=2 SLURM_STEP_NUM_TASKS=2", ()),
        ("RANK= WORLD_SIZE= LOCAL_RANK= MASTER_ADDR=here MASTER_PORT=x SLURM_NTASKS=8 SLURM_PROCID=0 PMI_SIZE=1", ()),
        (
            "ACCELERATE_DYNAMO_BACKEND=INDUCTOR ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
            ("dynamo_backend = inductor: not taken, machine.compile", "gradient_accumulation_steps = 4: not taken"),
        ),
        (
            "ACCELERATE_MIXED_PRECISION=fp8 ACCELERATE_USE_DEEPSPEED=true ACCELERATE_USE_PARALLELISM_CONFIG=true "
            "ACCELERATE_USE_MEGATRON_LM=true ACCELERATE_TORCH_DEVICE=meta LOCAL_RANK=0 WORLD_SIZE=1",
            ("mixed_precision = fp8: not taken, machine.precision decides", "use_deepspeed = true: not taken"),
        ),
        ("ACCELERATE_USE_FSDP=true FSDP_VERSION=1 FSDP_OFFLOAD_PARAMS=true", ("machine.shard = full",)),
    ],
)
def test_no_environment_computes_anything_but_the_recipe(
    tmp_path: Path, text: Path, plain: str, environment: str, said: tuple[str, ...]
) -> None:
    given = dict(each.split("=") for each in environment.split())
    done = ended(start(train(write_recipe(tmp_path, text)), tmp_path, given), tmp_path)
    assert done.status == 0 and done.err == "", done.err
    assert all(each in done.out for each in said) and ("not taken" in done.out) == ("not taken" in str(said))
    assert digest(tmp_path) == plain
