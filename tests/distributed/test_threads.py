"""How many CPU threads a process takes, and how they wait for each other beside other programs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm.distributed import environment, threads
from tests.forks import ROOT

V2 = "0::{path}\n", "30 23 0:26 {root} {top} rw - cgroup2 cgroup2 rw\n"
V1 = (
    "4:memory:/other\n2:cpu,cpuacct:{path}\n0::/\n",
    "32 31 0:29 {root} {top} rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n",
)


def process(folder: Path, kind: tuple[str, str], path: str = "/a/b", root: str = "/") -> Path:
    """/proc/self of a process in that control group, whose files are to lie under `folder`/top."""
    for name, text in zip(("cgroup", "mountinfo"), kind, strict=True):
        (folder / name).write_text(text.format(path=path, root=root, top=folder / "top"))
    return folder


def limit(group: Path, kind: tuple[str, str], quota: int, period: int = 100_000) -> None:
    group.mkdir(parents=True, exist_ok=True)
    if kind is V2:
        (group / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} {period}\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 8),
        ({"a/b": -1}, 8),
        ({"a/b": 50_000}, 1),  # half a CPU
        ({"a/b": 300_000}, 3),
        ({"a/b": 350_000}, 3),
        ({"a/b": 900_000}, 8),
        ({"a": 200_000, "a/b": -1}, 2),
        ({"": 400_000, "a": -1, "a/b": 600_000}, 4),
        ({"other": 100_000}, 8),
    ],
)
def test_quotas_of_a_group_and_of_those_above_it_count(
    tmp_path: Path, eight_cores: None, kind: tuple[str, str], quotas: dict[str, int], cores: int
) -> None:
    for group, quota in quotas.items():
        limit(tmp_path / "top" / group, kind, quota)
    assert threads.cores(process(tmp_path, kind)) == cores


@pytest.mark.parametrize("kind", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("path", "root"), [("/docker/x", "/docker/x"), ("/docker/x", "/"), ("/../x", "/"), ("/", "/"), ("/y", "/docker/x")]
)
def test_a_container_finds_its_quota(
    tmp_path: Path, eight_cores: None, kind: tuple[str, str], path: str, root: str
) -> None:
    limit(tmp_path / "top", kind, 25_000, 10_000)
    assert threads.cores(process(tmp_path, kind, path, root)) == 2


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path, eight_cores: None) -> None:
    assert threads.cores(tmp_path / "none") == 8


def test_what_the_user_asks_of_openmp_counts_and_the_recipe_more(
    eight_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(wanted: int | str, exact: bool = False) -> int:
        recipe = SimpleNamespace(machine=SimpleNamespace(threads=wanted, exact=exact))
        return environment.threads_of(recipe, {"threads": 5})  # type: ignore[arg-type]

    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert (threads.threads_per_process(), chosen("auto")) == (8, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.threads_per_process() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert (threads.threads_per_process(), chosen("auto"), chosen("auto", exact=True), chosen(7)) == (4, 4, 5, 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads.threads_per_process() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's own environment is read from /proc")
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize(
    ("users", "options", "counts"),
    [("", "", False), ("3", "", True), ("", "--num_cpu_threads_per_process=3", True)],
)
def test_a_launchers_number_is_not_the_users(
    tmp_path: Path, launcher: str, users: str, options: str, counts: bool
) -> None:
    """As `accelerate launch` and torchrun do: OMP_NUM_THREADS is set for the processes that they start."""
    (tmp_path / launcher).write_text(
        "import os, subprocess, sys\n"
        "child = 'from llm.distributed import threads; threads.cores = lambda: 8; print(threads.threads_per_process())'\n"
        "environment = {'OMP_NUM_THREADS': '3', **os.environ}\n"
        "sys.exit(subprocess.run([sys.executable, '-c', child], env=environment).returncode)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    environment |= {"PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "1"} | ({"OMP_NUM_THREADS": users} if users else {})
    command = [sys.executable, str(tmp_path / launcher), "launch", *options.split()]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == ("3" if counts else "8")


SPIN = """
    import os, time, torch
    from llm.distributed import threads

    torch.set_num_threads(2)
    numbers = torch.zeros(1 << 18)

    def burnt():
        began = os.times()
        for _ in range(40):
            numbers.add_(1)  # shared by the two threads; then one of them waits for the next
            time.sleep(0.005)
        ended = os.times()
        return ended.user + ended.system - began.user - began.system

    waited, speed = 1, 0
    def crowd():
        global waited
        waited += int(speed * threads.LOOK * 1e9)
        return waited
    threads._waited, threads.LOOK = crowd, 0.05
    threads.yield_to_neighbours()
    for speed in (0, 1, 0):
        time.sleep(0.3)
        print(burnt())
"""


def spun(**environment: str) -> list[float]:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", textwrap.dedent(SPIN)]
    said = subprocess.run(
        command, env=kept | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, check=True
    )
    return [float(line) for line in said.stdout.split()]


@pytest.mark.skipif(
    not list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    or threads.cores() < 2
    or threads._waited() is None,
    reason="needs Linux, two cores and libgomp",
)
def test_threads_spin_only_while_nobody_waits_for_the_cores() -> None:
    before, crowded, after = spun()
    assert crowded < 0.5 * min(before, after), (before, crowded, after)
    before, crowded, after = spun(GOMP_SPINCOUNT="300000")  # the user's own policy stays
    assert crowded > 0.5 * min(before, after), (before, crowded, after)


@pytest.mark.slow
def test_runs_that_prepare_their_text_have_the_same_bits(tmp_path: Path) -> None:
    """Threads that made MKL's first call together got other cosines in two of five such runs, on some machines."""
    keys = "tracking.every=1 evaluate.every=100k machine.threads=2 machine.stop_after=0.001 run=first"
    found = set()
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        line = [sys.executable, ROOT / "launch/train.py", ROOT / "recipes/quickstart.yaml", *keys.split()]
        ended = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        assert ended.returncode == 75, ended.stderr
        record = map(json.loads, (folder / "runs/first/metrics.jsonl").read_text().splitlines())
        found.add(next(line["gradient_norm"] for line in record if line["step"] == 1))
    assert len(found) == 1
