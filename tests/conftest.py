"""Fixtures of every test: it starts from a fixed seed and leaves no compiled code and no changed log level behind."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Split the cores among the processes of pytest-xdist, so that each does not take all of them."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


@pytest.fixture(autouse=True)
def _clean_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _log_level_as_found() -> Iterator[None]:
    yield
    assert logging.getLogger("sylva_compile").level == logging.NOTSET, "later tests read this log"
