"""The memory that this machine can still give to this process, by Linux's own figures."""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llm.distributed.threads import control_groups

KIB = 1024


def has_room(size: int, processes: int = 1) -> bool:
    """Whether `processes` like this one can each allocate `size` more bytes and still grow to their previous peak."""
    own = _fields(Path("/proc/self/status"))
    growth = KIB * (own.get("VmHWM", 0) - own.get("VmRSS", 0))
    return processes * (size + size // 20 + growth) <= available()


def available() -> float:
    """Bytes that processes here may still take, by the machine and by cgroups; infinite where it is not known."""
    machine = _fields(Path("/proc/meminfo")).get("MemAvailable")
    return min([KIB * machine if machine is not None else math.inf, *_left_by_groups()])


def _left_by_groups() -> Iterator[float]:
    for group in control_groups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max" is no number
                cached = _fields(group / "memory.stat").get("inactive_file", 0)  # given up where memory is short
                yield int((group / most).read_text()) - int((group / used).read_text()) + cached


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines such as `VmRSS: 1024 kB`, by name; none where it cannot be read."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(value) for name, value, *_ in (each for each in lines if len(each) > 1) if value.isdecimal()}
