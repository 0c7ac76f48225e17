"""Two and three ranks under DistributedDataParallel train as one process does on the batches of all."""

import dataclasses
from pathlib import Path
from typing import Any

import ddp_ranks
import pytest
import torch
import two_ranks
from ddp_ranks import CASES, Case, cases_of
from torch import Tensor

Saved = dict[str, Any]


def alone(case: Case) -> Saved:
    """Train a case in one process, uncompiled, with layers that are closed by `requires_grad`."""
    schedule = None if case.schedule is None else "toggle"
    case = dataclasses.replace(case, compiled="no", schedule=schedule)
    return ddp_ranks.train(case, ddp_ranks.batch(0, 1, case.dtype), wrap=False)


# One start of the ranks trains all cases: starting costs more than a case does.
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process_does(ranks: int, tmp_path: Path) -> None:
    two_ranks.run("ddp_ranks.py", str(ranks), tmp_path, ranks=ranks, timeout=540)
    for name in cases_of(ranks):
        first, *others = (torch.load(tmp_path / f"{name}{rank}") for rank in range(ranks))
        wanted = alone(CASES[name])
        for other in others:
            assert_equal(first, other, name)
        assert_close(first, wanted, name)
        assert first["moved"] > 1e-3, name
        blocks = sum(value.nbytes for value in wanted["blocks"].values())
        assert first["bytes"] == [blocks] * CASES[name].steps, f"{name}: more or less than the blocks is sent"


def assert_equal(first: Saved, other: Saved, name: str) -> None:
    for kind in ("weights", "blocks"):
        for weight, value in first[kind].items():
            assert torch.equal(other[kind][weight], value), f"{name}: ranks differ in the {kind} of {weight}"


def assert_close(found: Saved, wanted: Saved, name: str) -> None:
    for kind in ("weights", "blocks"):
        for weight, value in wanted[kind].items():
            if value.dtype == torch.bfloat16:
                assert bfloat16_steps(found[kind][weight], value) <= 1, f"{name}: {weight}"
            else:
                apart = (found[kind][weight] - value).abs().max()
                assert apart <= CASES[name].within, f"{name}: the {kind} of {weight} are {apart} apart"


def bfloat16_steps(found: Tensor, wanted: Tensor) -> int:
    """Return how many bfloat16 values lie between two tensors at most.

    Values near zero are left out: there bfloat16 is finer than the gradients, which are rounded to it on every rank.
    """
    large = wanted.abs() > 2**-8
    # Neighbours have neighbouring bit patterns.
    apart = found[large].view(torch.int16).int() - wanted[large].view(torch.int16).int()
    return int(apart.abs().max())
