"""Calls that run out of memory."""

from typing import Any

import pytest
import torch


def run_out_at(call: int, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """Let the `call`-th call of the function or method `name` of `owner` raise `torch.OutOfMemoryError`."""
    through, calls = getattr(owner, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        return through(*args, **options)

    patch.setattr(owner, name, counted)
