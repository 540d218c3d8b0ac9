"""What tracking costs of a step, with the live panel: python tests/benchmarks/tracking.py [key=value ...]

Trains quickstart's shape for 60 steps on a pseudo-terminal of 120 columns and measures, in the training process itself,
the seconds in what logs a step (record, console or panel) and in the trace beside those of the steps.
"""

import fcntl
import json
import os
import pty
import struct
import sys
import tempfile
import termios
import time
from collections import Counter
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 60


def child(folder: Path, overrides: list[str]) -> None:
    from llm.cli import train
    from llm.training.monitor import Monitor
    from llm.training.trainer import Trainer

    seconds: Counter[str] = Counter()

    def timed(owner: type, name: str) -> None:
        act = getattr(owner, name)

        @wraps(act)
        def measured(self: Any, *given: Any) -> Any:
            began = time.perf_counter()
            try:
                return act(self, *given)
            finally:
                seconds[name] += time.perf_counter() - began

        setattr(owner, name, measured)

    timed(Trainer, "update")
    timed(Monitor, "log")
    timed(Monitor, "record")
    train([str(ROOT / "recipes/quickstart.yaml"), f"train.tokens={STEPS * 2048}", "run=tracked", *overrides])
    (folder / "seconds.json").write_text(json.dumps(seconds))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        process, end = pty.fork()
        if process == 0:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
            os.environ["TERM"] = "xterm-256color"
            sys.path.insert(0, str(ROOT))
            os.chdir(name)
            child(Path(name), [f"text.cache={ROOT / 'data'}", *sys.argv[1:]])
            os._exit(0)
        said = b""
        with suppress(OSError):  # the child has closed its end
            while part := os.read(end, 1 << 16):
                said += part
        assert os.waitpid(process, 0)[1] == 0, said.decode(errors="replace")
        seconds = json.loads((Path(name) / "seconds.json").read_text())
    print(
        f"{STEPS} steps: {1e3 * seconds['update'] / STEPS:.0f} ms each, {said.count('╭'.encode())} drawings of the panel"
    )
    for name in ("log", "record"):
        print(f"{name:8} {1e3 * seconds[name] / STEPS:7.3f} ms a step, {seconds[name] / seconds['update']:.3%} of it")


if __name__ == "__main__":
    main()
