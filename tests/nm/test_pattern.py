from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nm_twin import mask_by_loops, second_mask

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm_transpose import OUTSIDE, nm_transpose
from sylva_compile.nm import pattern
from sylva_compile.nm.pattern import check_pattern, keep, keep_again

PATTERNS = [(1, 2), (2, 4), (2, 8), (1, 4), (3, 4), (3, 5)]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Draw small integers, so that there are ties and zeros, in a shape that both masks fit."""
    n, m = draw(st.sampled_from(PATTERNS))
    shape = (m * draw(st.integers(1, 4)), m * draw(st.integers(1, 4)))
    values = draw(st.lists(st.integers(-3, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values, dtype=torch.float64).reshape(shape), n, m


def dense_mask(columns: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(columns.shape[0], size, dtype=torch.bool).scatter_(1, columns.long(), True)


@given(matrices())
def test_the_largest_are_kept_and_ties_go_to_the_lower_index(drawn: Any) -> None:
    matrix, n, m = drawn
    columns = keep(matrix.abs(), n, m)
    assert torch.equal(dense_mask(columns, matrix.shape[1]), mask_by_loops(matrix.abs().tolist(), n, m))
    assert (columns.long().diff(dim=1) > 0).all()


@given(matrices())
def test_the_second_mask_keeps_zeros_inside_before_places_outside(drawn: Any) -> None:
    matrix, n, m = drawn
    columns = keep(matrix.abs(), n, m)
    first = dense_mask(columns, matrix.shape[1])
    values = matrix.gather(1, columns.long())
    rows, slots = keep_again(values, columns, matrix.shape[1], n, m)
    second = second_mask(matrix, first, n, m)
    assert torch.equal(dense_mask(rows, matrix.shape[0]).t(), second)
    packed = nm_transpose(values, rows, slots, n, m)
    dense = torch.zeros(matrix.shape[1], matrix.shape[0], dtype=torch.float64).scatter_(1, rows.long(), packed).t()
    assert torch.equal(dense, torch.where(first & second, matrix, 0.0))
    inside = first.t().gather(1, rows.long())
    assert torch.equal(slots != OUTSIDE, inside)


def test_masks_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(24, 16)
    whole = keep(matrix, 2, 4)
    monkeypatch.setattr(pattern, "_MOST", 40)
    assert torch.equal(keep(matrix, 2, 4), whole)


def test_columns_are_as_narrow_as_they_may_be() -> None:
    assert keep(torch.randn(1, 1 << 15), 2, 4).dtype == torch.int16
    wide = keep(torch.randn(1, (1 << 15) + 4), 2, 4)
    assert wide.dtype == torch.int32 and int(wide[0, -1]) > 1 << 15


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 257), (2.0, 4), (True, 4)])
def test_patterns_that_cannot_be_used_are_refused(n: Any, m: Any) -> None:
    with pytest.raises(ArgumentError, match="1 <= n < m <= 256"):
        check_pattern(n, m)
