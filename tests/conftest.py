"""What all tests share."""

import os

# Their bars share one lock over all forked processes, and a child that is killed may hold it for ever.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Whether there is a GPU is asked in a way that leaves CUDA alone, which no forked child could use otherwise.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# OpenMP's threads do not survive a fork: a child that has several must not inherit a parent's.
os.environ["OMP_NUM_THREADS"] = "1"

import signal
from collections.abc import Iterator

import pytest
import torch

from llm.distributed.environment import measured_flops


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The number of threads is part of what decides the bits."""
    torch.set_num_threads(1)
    measured_flops(torch.device("cpu"), torch.float32, 1024)  # the runs that are forked from here keep the figure


@pytest.fixture(autouse=True)
def signals_end_processes() -> Iterator[None]:
    """`errors.run`, which ends a process, ignores late signals; processes that later tests start would inherit that."""
    yield
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
