"""Sums of gradients; several processes are in tests/test_sharded_trace.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from specs import spec
from torch import Tensor

from sylva_compile.curvature.gradient_sum import GradientSum, RowSum, WholeSum, gradient_sum
from sylva_compile.errors import TraceError


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def operands(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(7, 4), torch.randn(7, 5)) for _ in range(count)]


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_sums_products_or_their_squares(group: dist.ProcessGroup, squared: bool, split: bool) -> None:
    found = gradient_sum(spec(5, 4), None, group if split else None, squared=squared)
    total = torch.zeros(5, 4)
    for x, gy in operands():
        found.add(x, gy)
        assert found.is_waiting == split
        total += (gy.t() @ x).square() if squared else gy.t() @ x
    found.settle()
    found.settle()
    found.combine(group)
    assert not found.is_waiting
    torch.testing.assert_close(found.whole(), total)


def test_half_precision_operands_are_summed_in_float32(group: dist.ProcessGroup) -> None:
    sums: list[GradientSum] = [
        WholeSum(spec(5, 4, torch.bfloat16), None),
        RowSum(spec(5, 4, torch.bfloat16), None, group),
    ]
    for one in sums:
        for x, gy in [(torch.ones(7, 4), torch.full((7, 5), 1 + 2**-7))] * 2:
            one.add(x.bfloat16(), gy.bfloat16())
        one.settle()
        assert one.kept.dtype == torch.float32
        assert one.whole().eq(14 * (1 + 2**-7)).all()


@pytest.mark.parametrize("changed", [0, 1])
def test_operands_that_change_before_they_are_used(group: dist.ProcessGroup, changed: int) -> None:
    one = RowSum(spec(5, 4), None, group)
    pair = operands(1)[0]
    one.add(*pair)
    pair[changed].add_(1)
    with pytest.raises(TraceError, match="in-place"):
        one.settle()
    assert not one.is_waiting
