"""Every test starts from a clean compiler and leaves none of its compiled code behind."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
