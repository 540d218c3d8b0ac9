"""What all tests share."""

import os

# Their bars share one lock over all forked processes, and a child that is killed may hold it for ever.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The number of threads is part of what decides the bits."""
    torch.set_num_threads(1)
