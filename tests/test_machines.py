"""Two machines: network namespaces with addresses of their own, joined by a cable, each with its launcher and its disk.

A machine dies as a machine does: everything in its namespace is killed at once.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from llm.base import atomic_io
from llm.run_folder import checkpoint
from tests.forks import ROOT, SENTENCES, digest, write_recipe, write_text

pytestmark = pytest.mark.slow
STEPS = 240


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


@dataclass
class Machine:
    name: str
    address: str
    interface: str
    folder: Path = field(default_factory=Path)
    launcher: subprocess.Popen[bytes] | None = None

    def start(self, number: int, main: str, processes: int, *overrides: str) -> None:
        """`accelerate launch` as machine `number` of two with `processes` each."""
        line = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_machines", "2"]
        line += ["--num_processes", str(2 * processes), "--machine_rank", str(number), "--main_process_ip", main]
        line += ["--main_process_port", "29500", str(ROOT / "launch/train.py"), "recipe.yaml", *overrides]
        environment = os.environ | {
            "HF_HOME": str(self.folder), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.interface,
            "TP_SOCKET_IFNAME": self.interface}  # fmt: skip
        with (self.folder / f"said-{number}.txt").open("ab") as said:
            self.launcher = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *line], cwd=self.folder, env=environment, stdout=said, stderr=said
            )

    def ended(self, seconds: float = 120) -> int:
        assert self.launcher is not None
        return self.launcher.wait(seconds)

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("said-*.txt")))

    def die(self) -> None:
        for process in ip("netns", "pids", self.name, check=False).split():
            os.kill(int(process), signal.SIGKILL)
        if self.launcher is not None:
            self.launcher.wait()


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    if shutil.which("ip") is None:
        pytest.skip("two machines are network namespaces here: `ip` (iproute2) is missing")
    mark = f"llm{os.getpid() % 100000}"
    both = [Machine(f"{mark}{side}", f"10.77.0.{number}", f"{mark}{side}") for number, side in ((1, "a"), (2, "b"))]
    made = subprocess.run(["ip", "netns", "add", both[0].name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"two machines are network namespaces here, which may not be made: {made.stderr.strip()}")
    try:
        ip("netns", "add", both[1].name)
        ip("link", "add", both[0].interface, "type", "veth", "peer", "name", both[1].interface)
        for each in both:
            ip("link", "set", each.interface, "netns", each.name)
            ip("-n", each.name, "address", "add", f"{each.address}/24", "dev", each.interface)
            ip("-n", each.name, "link", "set", each.interface, "up")
            ip("-n", each.name, "link", "set", "lo", "up")
        yield both
    finally:
        for each in both:
            each.die()
            ip("netns", "delete", each.name, check=False)  # the cable goes with its end


def write(folder: Path, text: Path) -> Path:
    """A disk: the text, the recipe, and all that a run leaves; names in the recipe are relative to it."""
    folder.mkdir()
    shutil.copy(text, folder / "text.txt")
    write_recipe(
        folder,
        Path("text.txt"),
        **{
            "machine.micro_batch": 1,
            "train.steps": STEPS,
            "checkpoint.every": 20,
            "evaluate.every": 50,
            "text.cache": "cache",
        },
    )
    return folder


def start(both: list[Machine], processes: int, *overrides: str) -> None:
    for number, machine in enumerate(both):
        machine.start(number, both[0].address, processes, *overrides)


def finish(both: list[Machine], processes: int) -> None:
    for machine in both:
        assert machine.ended() == 0, machine.said()[-4000:]
    newest = checkpoint.newest(both[0].folder / "runs/tiny", print)
    assert newest is not None and newest.manifest["machine"]["world"] == 2 * processes


def wait_for(folder: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not (folder / checkpoint.MANIFEST).exists():
        assert time.monotonic() < until, f"{folder} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize(("disks", "processes", "dies"), [(2, 1, 1), (1, 2, 0), (1, 1, 1)])
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_machine_that_dies_changes_nothing(
    tmp_path: Path, machines: list[Machine], disks: int, processes: int, dies: int, shard: str
) -> None:
    text = write_text(tmp_path / "text.txt")
    override = f"machine.shard={shard}"

    def on(name: str) -> list[Machine]:
        folders = [write(tmp_path / f"{name}-{number}", text) for number in range(disks)]
        for number, machine in enumerate(machines):
            machine.folder = folders[number % disks]
        return machines

    finish_whole = on("whole")
    start(finish_whole, processes, override)
    finish(finish_whole, processes)
    expected = [digest(machine.folder) for machine in machines]
    assert expected[0] == expected[1]

    both = on("cut")
    start(both, processes, override)
    wait_for(checkpoint.folder_of(both[0].folder / "runs/tiny", 80))
    both[dies].die()
    survivor = both[1 - dies]
    assert survivor.ended(60) != 0
    assert "is gone" in survivor.said() and "run the same command again" in survivor.said(), survivor.said()[-4000:]
    stopped = [checkpoint.newest(machine.folder / "runs/tiny", print) for machine in both]
    assert all(each is not None and 60 <= each.step < STEPS for each in stopped)
    if disks == 2:
        # One machine's last checkpoint never came to be, the other's next to last is damaged.
        shutil.rmtree(checkpoint.folders(both[1].folder / "runs/tiny")[0])
        damaged = checkpoint.folders(both[0].folder / "runs/tiny")[1] / checkpoint.WEIGHTS
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for machine in both:
        machine.die()
    start(both, processes, override)
    finish(both, processes)
    assert [digest(machine.folder) for machine in both] == expected
    status = json.loads((both[0].folder / "runs/tiny/status.json").read_text())
    assert status["status"] == 0
    assert "resuming tiny" in both[0].said()


def shards_of(folder: Path) -> dict[str, str]:
    return {path.name: atomic_io.sha256(path) for path in folder.glob("cache/shards/*/*")}


@pytest.mark.parametrize("disks", [2, 1])
def test_two_machines_prepare_a_text_together_and_one_that_dies_costs_no_finished_file(
    tmp_path: Path, machines: list[Machine], disks: int
) -> None:
    draw, words = np.random.default_rng(0), " ".join(SENTENCES).split()
    text = tmp_path / "text.txt"
    with text.open("w") as file:
        for number in range(50_000):
            file.write(f"{number} {' '.join(words[at] for at in draw.integers(0, len(words), 100))}\n<|endoftext|>\n")
    shorter = ("train.steps=4", "checkpoint.every=4", "evaluate.every=4", "text.validation=0.0005")
    alone = write(tmp_path / "alone", text)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "recipe.yaml", *shorter],
        cwd=alone,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    folders = [write(tmp_path / f"together-{number}", text) for number in range(disks)]
    for number, machine in enumerate(machines):
        machine.folder = folders[number % disks]
    start(machines, 1, *shorter)
    until = time.monotonic() + 400
    while not all([*folder.glob("cache/shards/*/journal.json")] for folder in folders):
        assert time.monotonic() < until
        time.sleep(0.02)
    machines[1].die()
    assert machines[0].ended(180) != 0 and "is gone" in machines[0].said(), machines[0].said()[-4000:]
    there = [{path: path.stat().st_mtime_ns for path in folder.glob("cache/shards/*/*.arrow")} for folder in folders]
    assert all(there)
    start(machines, 1, *shorter)
    finish(machines, 1)
    for folder, times in zip(folders, there, strict=True):
        assert shards_of(folder) == shards_of(alone)
        assert {path: path.stat().st_mtime_ns for path in times} == times
    shares = re.findall(r"encoding: ([\d.]+) \+ ([\d.]+) MB on 2 machines", machines[0].said())
    assert len(shares) == 1, "of the second start; the first did not come so far"
    one, other = map(float, shares[0])
    assert abs(one - other) < 3 and 5 < one + other < text.stat().st_size / 1e6 - 16
    print(f"{disks} disks: {one} and {other} MB encoded after the kill, of {text.stat().st_size / 1e6:.1f}")
