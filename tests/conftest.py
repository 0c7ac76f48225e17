"""Every test starts from a clean compiler, and leaves none of its compiled code nor a changed log level behind."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _log_level_as_found() -> Iterator[None]:
    yield
    assert logging.getLogger("sylva_compile").level == logging.NOTSET, "later tests read this log"
