"""How much of the exchange of gradients is hidden behind the backward pass: python tests/benchmarks/overlap.py [--processes N] [--link MBIT]
[--delay MS] [--rounds N] [--recipe FILE] [--set key=value ...]

Forward and backward passes of the real trainer on processes with one thread each, in turn: without an exchange, with one that each
bucket waits for (as it was once), and with one beside the backward pass; then the exchange alone. The gradients of both exchanges are
compared to the bit. With `--link`, each half of the processes is a machine of its own, a network namespace: packets leave it at that
rate (tc's tbf) and are carried to the other one by a relay that sleeps for `--delay` first. That needs root, `ip` and an even N.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from safety import real_trainer
from torch import Tensor

from llm.config.reading import load
from llm.distributed import exchange, process
from llm.distributed.exchange import Exchange
from llm.distributed.sharding import all_reduce
from llm.training.trainer import Trainer

KINDS = ("without", "waiting", "beside")
TUN, NO_HEADER, SET_NAME, NEW_NETWORK = 0x0001, 0x1000, 0x400454CA, 0x40000000  # of Linux's if_tun.h and sched.h
MTU = 9000  # bytes of a packet: the larger, the less a relay in Python has to do


def timed(trainer: Trainer, act: Callable[[], object]) -> float:
    """Seconds of the slowest process, which begin together."""
    coordinator = trainer.context.coordinator
    coordinator.largest(0)
    began = time.perf_counter()
    act()
    return coordinator.largest(int(1e6 * (time.perf_counter() - began))) / 1e6


def measure(trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind, and of the exchange alone, in each round."""
    step, buckets = trainer.gradient_step, list[Tensor]()
    trainer.micro_batches.rehearse()
    batches = trainer.micro_batches.batches(0)

    def noted(self: Exchange, flat: Tensor) -> Callable[[], object]:
        buckets.append(flat)
        return lambda: None

    def waited(self: Exchange, flat: Tensor) -> Callable[[], object]:
        all_reduce(flat)
        return lambda: None

    starts, piece = {"without": noted, "waiting": waited, "beside": Exchange._start}, exchange.PIECE
    step.accumulate(batches)  # DDP divides its buckets anew after the first step
    found: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "alone")}
    for number in range(rounds):
        gradients = []
        for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
            buckets.clear()
            Exchange._start = starts[kind]  # type: ignore[method-assign]
            exchange.PIECE = piece if kind == "beside" else 1 << 40
            found[kind].append(timed(trainer, lambda: step.accumulate(batches)))
            if kind == "without":
                whole = list(buckets)
            else:
                gradients.append([p.grad.clone() for p in trainer.state.model.parameters() if p.grad is not None])
        assert all(map(torch.equal, *gradients)), "the exchange beside the backward pass has other bits"
        found["alone"].append(timed(trainer, partial(deque, map(all_reduce, whole), maxlen=0)))
    sizes = [flat.numel() * flat.element_size() / 1e6 for flat in whole]
    process.say(f"{len(sizes)} buckets of {min(sizes):.2f} to {max(sizes):.2f} MB, {sum(sizes):.1f} MB in all")
    return found


def worker(given: argparse.Namespace) -> None:
    recipe = load(given.recipe, ["machine.threads=1", "run=overlap", *given.set])
    with real_trainer(recipe) as trainer:
        assert process.world() == torch.distributed.get_world_size() == given.processes
        found = measure(trainer, given.rounds)
        trainer.context.coordinator.leave()
    hidden = {
        kind: [1 - (a - b) / c for a, b, c in zip(found[kind], found["without"], found["alone"], strict=True)]
        for kind in KINDS[1:]
    }
    process.say(f"{'':44}{'min':>9}{'median':>9}{'max':>9}   of {given.rounds}")
    for kind, seconds in found.items():
        row(f"{kind}, ms", [1e3 * each for each in seconds])
    for kind, shares in hidden.items():
        row(f"{kind}, % of the exchange hidden", [100 * each for each in shares])


def row(name: str, values: list[float]) -> None:
    process.say(f"{name:44}{min(values):9.1f}{statistics.median(values):9.1f}{max(values):9.1f}")


# ------------------------------------------------------------------------------------------------- processes and links


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def open_device(name: str) -> int:
    """A network device of this name in the namespace of this name; its packets are read and written as a file."""
    with Path(f"/var/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"no way into the namespace {name}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, SET_NAME, struct.pack("16sH", name.encode(), TUN | NO_HEADER))
    return device


def carry(source: int, target: int, delay: float) -> None:
    """Carry each packet from one device to the other, `delay` seconds after it came."""
    packets: SimpleQueue[tuple[float, bytes]] = SimpleQueue()

    def deliver() -> None:
        while True:
            due, packet = packets.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):  # the device is not up yet
                os.write(target, packet)

    Thread(target=deliver, daemon=True).start()
    while True:
        packets.put((time.monotonic() + delay, os.read(source, 1 << 16)))


def relay(names: list[str], delay: float, ready: int) -> None:
    one, other = map(open_device, names)
    os.write(ready, b"!")
    Thread(target=carry, args=(one, other, delay), daemon=True).start()
    carry(other, one, delay)


@contextmanager
def link(rate: float, delay: float) -> Iterator[list[str]]:
    """Two namespaces 10.78.0.1 and 10.78.0.2, each with a device of its name; Mbit/s, seconds in each direction."""
    names = [f"link{os.getpid() % 100000}{side}" for side in "ab"]
    heard, said = os.pipe()
    try:
        for name in names:
            ip("netns", "add", name)
        if not (child := os.fork()):
            relay(names, delay, said)
        os.read(heard, 1)
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.78.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "mtu", str(MTU), "up")
            ip("-n", name, "link", "set", "lo", "up")
            shape = ["tbf", "rate", f"{rate}mbit", "burst", "64kb", "latency", "400ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", name, "root", *shape], check=True)
        yield names
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name in names:
            ip("netns", "delete", name)


def start(given: argparse.Namespace, names: list[str]) -> None:
    """Start the processes, each in its namespace where there are any, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    of = given.processes // max(1, len(names))  # processes of one machine
    for rank in range(given.processes):
        machine, local = divmod(rank, of)
        place: dict[str, Any] = {
            "RANK": rank,
            "WORLD_SIZE": given.processes,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": of,
        }
        place |= {"MASTER_ADDR": "10.78.0.1" if names else "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        place |= {"GLOO_SOCKET_IFNAME": names[machine], "TP_SOCKET_IFNAME": names[machine]} if names else {}
        line = ["ip", "netns", "exec", names[machine]] if names else []
        line += [sys.executable, __file__, "--worker", *sys.argv[1:]]
        children.append(subprocess.Popen(line, env=os.environ | {name: str(value) for name, value in place.items()}))
    statuses = [child.wait() for child in children]
    if any(statuses):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--link", type=float, default=0.0, help="Mbit/s between two machines; 0: one machine")
    parser.add_argument("--delay", type=float, default=5.0, help="milliseconds from one of them to the other")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml").absolute())
    parser.add_argument("--set", nargs="*", default=[f"text.cache={Path('data').absolute()}"], help="key=value")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.link and given.processes % 2:
        parser.error("--link divides the processes between two machines: --processes must be even")
    if given.worker:
        worker(given)
    elif given.link:
        with link(given.link, given.delay / 1e3) as names:
            start(given, names)
    else:
        start(given, [])


if __name__ == "__main__":
    main()
