"""Every test starts from a clean compiler, and leaves none of its compiled code nor a changed log level behind."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Processes that test side by side share the cores, and do not each take all of them."""
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
