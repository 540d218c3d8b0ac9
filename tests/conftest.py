"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The number of threads is part of what decides the bits."""
    torch.set_num_threads(1)
