"""CPU threads of this process: their number, and how they wait for each other.

The number affects a run's bits, so it never depends on how busy the machine is. How they wait does not.
"""

import ctypes
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

LAUNCHERS = re.compile(r"/(accelerate|accelerate-launch|torchrun)\0|\0(accelerate\.commands|torch\.distributed)\.")
LOOK = 0.2  # seconds between two measurements of how long threads wait for a core
CROWDED = 0.2  # share of that time, summed over threads: < 0.1 on a quiet machine, 0.24 to 0.9 next to a busy program
IDLE = 64  # most threads of the idle team


def cores(process: Path = Path("/proc/self")) -> int:
    """CPUs that this process may use at once by its affinity and its cgroup quotas; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, _quota(process))))


def threads_per_process() -> int:
    """OMP_NUM_THREADS if the user set it, otherwise this process's share of the machine's cores."""
    return _number("OMP_NUM_THREADS") if _set_by_user() else max(1, cores() // _number("LOCAL_WORLD_SIZE"))


def _number(name: str) -> int:
    said = os.environ.get(name, "").split(",")[0].strip()  # OpenMP allows a list, one number per nesting level
    return max(1, int(said)) if said.isdecimal() else 1


def _set_by_user() -> bool:
    """Whether the user set OMP_NUM_THREADS, and not accelerate or torchrun, which usually set it to 1."""
    if not os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip().isdecimal():
        return False
    above = Path(f"/proc/{os.getppid()}")
    try:
        command = (above / "cmdline").read_bytes().decode(errors="replace")
        if not LAUNCHERS.search(command):
            return True
        environment = (above / "environ").read_bytes().split(b"\0")  # the launcher's own
    except OSError:  # not Linux
        return not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    requested = re.search(r"\0--num[_-]cpu[_-]threads[_-]per[_-]process\b", command)
    return bool(requested) or any(each.startswith(b"OMP_NUM_THREADS=") for each in environment)


def _quota(process: Path) -> float:
    """CPUs granted by the cgroups of the process and by their parents."""
    return min(map(_limit, control_groups("cpu", process)), default=math.inf)


def control_groups(controller: str, process: Path = Path("/proc/self")) -> Iterator[Path]:
    """Folders of the process's cgroups (v1 and v2) for `controller`, cpu or memory, each with those of its parents."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    paths = {name: path for _, controllers, path in groups for name in controllers.split(",")}
    for mount, (kind, *_, options) in ((mount.split(), rest.split()) for mount, rest in mounts):
        ours = kind == "cgroup" and controller in options.split(",")
        name = controller if ours else "" if kind == "cgroup2" else None
        if name not in paths:
            continue
        # A container may see its own cgroup as the root of the mount, yet read the host's path in /proc/self/cgroup.
        root, top, path = Path(mount[3]), Path(mount[4]), Path(paths[name])
        below = path.relative_to(root) if path.is_relative_to(root) else Path()
        yield from [top / below, *(top / below).parents][: len(below.parts) + 1]


def _limit(group: Path) -> float:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
            return quota / period if quota > 0 else math.inf  # "max" raises ValueError
    return math.inf


def use_threads(number: int) -> None:
    """From now on, compute on `number` threads, which yield to neighbours.

    MKL chooses its kernels for cos, sin, log and the like at its first call. When two threads make that call at once,
    one may get a kernel of low accuracy (cosines were 1.5e-4 off), so this thread makes it alone.
    """
    import torch

    torch.set_num_threads(number)
    torch.ones(1).cos()
    yield_to_neighbours()


def yield_to_neighbours() -> None:
    """From now on, make OpenMP threads sleep instead of spin while other programs use this process's cores.

    A libgomp thread that waits for another spins for milliseconds: quickest if both have a core, but if another program
    took one, spinning keeps the other thread from running. libgomp reads its policy only once, when it loads, but spins
    for mere microseconds while the process has more OpenMP threads than cores (GOMP_SPINCOUNT in its manual). Starting
    a second team of idle threads therefore switches the policy. Does nothing if the user set one.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() or _waited() is None or Watch.started:
        return
    import torch

    openmp = _openmp()
    if openmp is None or torch.get_num_threads() == 1:
        return
    team = max(2, openmp.omp_get_num_procs() - torch.get_num_threads() + 2)  # one thread more than there are cores
    if team <= IDLE:
        Watch.started = True
        Watch(openmp, team).start()


def compute_alone() -> None:
    """Give the calling thread no OpenMP team of its own, which would take cores from that of the main thread."""
    import torch

    torch.get_num_threads()  # at the first question torch sets this thread's number
    if (openmp := _openmp()) is not None:
        openmp.omp_set_num_threads(1)  # of this thread alone


def _openmp() -> ctypes.CDLL | None:
    """The libgomp that torch brings along, if it does."""
    import torch

    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    return None if library is None else ctypes.CDLL(str(library))


class Watch(Thread):
    """Measures how long this process's threads wait for cores, and switches OpenMP's policy accordingly."""

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
            limit = CROWDED if idle is None else CROWDED / 2  # sleeping threads wait less than spinning ones
            crowded = waited - before > limit * (when - since)
            if crowded and idle is None:
                idle = Event()
                Thread(target=self.keep_team, args=[idle], daemon=True).start()
            elif not crowded and idle is not None:
                idle.set()
                idle = None

    def keep_team(self, until: Event) -> None:
        """Keep a team of sleeping threads, which end with this one."""
        self.openmp.GOMP_parallel(ctypes.CDLL(None).free, None, self.team, 0)  # each of them calls free(NULL)
        until.wait()


def _waited() -> int | None:
    """Nanoseconds that this process's threads were ready to run but had no core; None if unknown."""
    total = 0
    try:
        for each in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                total += int((each / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total or None
