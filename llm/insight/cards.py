"""Cards by name: memory, bandwidth and matrix throughput; and this machine's own CPU.

`half` is the dense throughput of tensor cores in bf16 (T4, V100: fp16) with sums in fp32, half of what a GeForce's box
says; `single` is plain fp32. Checked on 2026-11-28 against public pages that quote the SOURCES, which could not be
opened themselves. They print every figure but those named in DERIVED.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm.base.errors import RecipeError

GIB = 1 << 30
BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # of CPUs that multiply bf16 faster than fp32
BF16_GAIN = 1.4  # of a step there: 1.36 at quickstart's size, 1.45 at classic's (tests/benchmarks/README.md)
SHARED = 0.8  # of one thread's speed, that each of several threads reaches in a product (two AVX2 cores, 2026-11-30)


@dataclass(frozen=True)
class Device:
    """A card, or a CPU with its memory. `half` and `single`: operations per second of a matrix product; 0: unknown."""

    name: str
    memory: float  # bytes
    bandwidth: float = 0.0  # bytes per second
    half: float = 0.0
    single: float = 0.0
    cuda: bool = True


SOURCES = {  # documents of NVIDIA
    "GA102": "Ampere GA102 GPU Architecture whitepaper, V2 (2021), and GeForce RTX 30 specifications",
    "Ada": "Ada GPU Architecture whitepaper, V2.1 (2023), appendix A, and GeForce RTX 40 specifications",
    "Blackwell": "RTX Blackwell GPU Architecture whitepaper (2025)",
    "Turing": "T4 data sheet (2019); 16 GB, of which error correction leaves 15",
    "Volta": "V100 architecture whitepaper (2017)",
    "A100": "A100 data sheet, 80 GB SXM",
    "L4": "L4 data sheet (2023), halved: it counts sparse products; 24 GB, of which error correction leaves 22",
    "Hopper": "H100 and H200 SXM data sheets, halved: they count sparse products; memory as CUDA reports it",
}
DERIVED = {  # what no page was found to print
    "3060": "half", "3070": "half", "3080": "half", "3080ti": "half", "3090": "half", "4060ti": "half",
    "4070": "half and single",
}  # fmt: skip
# `half` there is twice `single`, as the whitepapers have it for the 4090 and the 5090; the 4070's `single` is its 5,888
# cores at 2,475 MHz.

_TABLE = {  # GiB, GB/s, TFLOP/s in half and in single precision, source
    "3060": (12, 360, 25.5, 12.7, "GA102"), "3070": (8, 448, 40.6, 20.3, "GA102"),
    "3080": (10, 760, 59.5, 29.8, "GA102"), "3080ti": (12, 912, 68.2, 34.1, "GA102"),
    "3090": (24, 936, 71.0, 35.6, "GA102"), "4060ti": (16, 288, 44.1, 22.1, "Ada"),
    "4070": (12, 504, 58.3, 29.1, "Ada"), "4080": (16, 717, 97.5, 48.7, "Ada"),
    "4090": (24, 1008, 165.2, 82.6, "Ada"), "5090": (32, 1792, 209.5, 104.8, "Blackwell"),
    "t4": (15, 320, 65, 8.1, "Turing"), "v100": (16, 900, 125, 15.7, "Volta"),
    "a100": (80, 2039, 312, 19.5, "A100"), "l4": (22, 300, 121, 30.3, "L4"),
    "h100": (79, 3350, 989, 67, "Hopper"), "h200": (139, 4800, 989, 67, "Hopper"),
}  # fmt: skip
CARDS = {
    name: Device(name, gib * GIB, bandwidth * 1e9, half * 1e12, single * 1e12)
    for name, (gib, bandwidth, half, single, _) in _TABLE.items()
}


def card(name: str) -> Device:
    """A card of the table by name: 3080ti, "RTX 3080 Ti". RecipeError names those that there are."""
    short = re.sub(r"nvidia|geforce|rtx|gtx|[^a-z0-9]", "", name.lower())
    if short not in CARDS:
        raise RecipeError(f"--gpu {name[:40]}: not in the table; use one of {', '.join(CARDS)}, or --memory 12GB")
    return CARDS[short]


def bytes_of(text: str) -> float:
    """12GB, 11.5 GiB or 800MB in bytes; GB means GiB, as on a card's box. RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mgt])i?b?\s*", text.lower())
    if not match or not 0 < float(match[1]) < 1e9:
        raise RecipeError(f"--memory {text[:40]}: expected a size such as 12GB")
    return float(match[1]) * {"m": 1 << 20, "g": GIB, "t": 1 << 40}[match[2]]


def this_cpu(threads: int) -> Device:
    """This machine's CPU: its memory, and the speed of numpy's matrix product on `threads` threads.

    It times a product so small that numpy computes it on one thread. Beside other programs a larger one waits for its
    second thread and can appear twenty times slower.
    """
    a = np.ones((64, 64), np.float32)
    best, until = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    single = threads * (SHARED if threads > 1 else 1.0) * 2 * 64**3 / best
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    gain = BF16_GAIN if any(flag in flags for flag in BF16_FLAGS) else 1.0
    return Device(f"this CPU, {threads} thread{'s' * (threads > 1)}", memory, 0.0, single * gain, single, cuda=False)
