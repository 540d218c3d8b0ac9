"""CPU threads of this process: how many there are, and how they wait for each other.

The number is part of what decides a run's bits, so it never depends on how busy the machine is; how they wait is not.
"""

import ctypes
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

LAUNCHERS = re.compile(r"/(accelerate|accelerate-launch|torchrun)\0|\0(accelerate\.commands|torch\.distributed)\.")
LOOK = 0.2  # seconds between two looks at how long threads wait for a core
CROWDED = 0.2  # of that time, all threads together: a quiet machine shows less than 0.1, a busy program 0.24 to 0.9
IDLE = 64  # threads at most that may be made only to be counted


def cores(process: Path = Path("/proc/self")) -> int:
    """CPUs that this process may use at once, by its affinity and by the quotas of its control groups, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, _quota(process))))


def share() -> int:
    """Threads for this process: OMP_NUM_THREADS where the user set it, else its share of the machine's cores."""
    return _number("OMP_NUM_THREADS") if _users_own() else max(1, cores() // _number("LOCAL_WORLD_SIZE"))


def _number(name: str) -> int:
    said = os.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a number for each level of nesting
    return max(1, int(said)) if said.isdecimal() else 1


def _users_own() -> bool:
    """Whether OMP_NUM_THREADS is the user's: accelerate and torchrun give it to their processes, mostly as 1."""
    if not os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip().isdecimal():
        return False
    above = Path(f"/proc/{os.getppid()}")
    try:
        command = (above / "cmdline").read_bytes().decode(errors="replace")
        if not LAUNCHERS.search(command):
            return True
        environment = (above / "environ").read_bytes().split(b"\0")  # as the launcher found it
    except OSError:  # not Linux
        return not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    told = re.search(r"\0--num[_-]cpu[_-]threads[_-]per[_-]process\b", command)
    return bool(told) or any(each.startswith(b"OMP_NUM_THREADS=") for each in environment)


def _quota(process: Path) -> float:
    """CPUs granted by the control groups (v1 and v2) that the process is in, and by those above them."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return math.inf
    paths = {controller: path for _, controllers, path in groups for controller in controllers.split(",")}
    least = math.inf
    for mount, (kind, *_, options) in ((mount.split(), rest.split()) for mount, rest in mounts):
        controller = "cpu" if kind == "cgroup" and "cpu" in options.split(",") else "" if kind == "cgroup2" else None
        if controller not in paths:
            continue
        # A container may see its own group as the root of the mount, and still read the path that the host gave it.
        root, top, path = Path(mount[3]), Path(mount[4]), Path(paths[controller])
        below = path.relative_to(root) if path.is_relative_to(root) else Path()
        levels = [top / below, *(top / below).parents][: len(below.parts) + 1]
        least = min(least, *map(_limit, levels))
    return least


def _limit(group: Path) -> float:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
            return quota / period if quota > 0 else math.inf  # "max", which is no number, is the other way to say so
    return math.inf


def yield_to_neighbours() -> None:
    """From now on let OpenMP's threads sleep instead of spin while other programs use this process's cores.

    A thread of libgomp that waits for another spins for milliseconds. That is quickest where both have a core; where a
    neighbour has taken the other's, spinning is what keeps the other from running. libgomp reads its policy once, when
    it loads, but spins for microseconds only while a process has more of its threads than cores (GOMP_SPINCOUNT in its
    manual), so that a second team of idle threads is a switch. Whoever set the policy, or has no libgomp, keeps theirs.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() or _waited() is None or Watch.started:
        return
    import torch

    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    if library is None or torch.get_num_threads() == 1:
        return
    openmp = ctypes.CDLL(str(library))
    team = max(2, openmp.omp_get_num_procs() - torch.get_num_threads() + 2)  # makes one more than there are cores
    if team <= IDLE:
        Watch.started = True
        Watch(openmp, team).start()


class Watch(Thread):
    """Looks now and then whether this process's threads wait for cores, and tells OpenMP's how to wait."""

    started = False

    def __init__(self, openmp: ctypes.CDLL, team: int) -> None:
        super().__init__(daemon=True)
        self.openmp, self.team = openmp, team

    def run(self) -> None:
        idle: Event | None = None
        waited, when = _waited() or 0, time.monotonic_ns()
        while True:
            time.sleep(LOOK)
            before, since = waited, when
            waited, when = _waited() or 0, time.monotonic_ns()
            limit = CROWDED if idle is None else CROWDED / 2  # threads that sleep wait less than those that spin
            crowded = waited - before > limit * (when - since)
            if crowded and idle is None:
                idle = Event()
                Thread(target=self.keep_team, args=[idle], daemon=True).start()
            elif not crowded and idle is not None:
                idle.set()
                idle = None

    def keep_team(self, until: Event) -> None:
        """A team that does nothing: its threads sleep, and end with this one."""
        self.openmp.GOMP_parallel(ctypes.CDLL(None).free, None, self.team, 0)  # each of them calls free(NULL)
        until.wait()


def _waited() -> int | None:
    """Nanoseconds that this process's threads were ready to run and had no core; None where it cannot be known."""
    total = 0
    try:
        for each in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                total += int((each / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total or None
