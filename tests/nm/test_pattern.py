from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nm_operands import columns_twin, dense_twin
from nm_twin import mask_by_loops, second_mask

from sylva_compile.errors import ArgumentError, MaskError
from sylva_compile.kernels.nm_codes import bits_of
from sylva_compile.kernels.nm_transpose import nm_transpose
from sylva_compile.nm import pattern
from sylva_compile.nm.pattern import check_codes, check_pattern, codes_of, keep, keep_again

PATTERNS = [(1, 2), (2, 4), (2, 8), (1, 4), (3, 4), (3, 5)]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Draw small integers, so that there are ties and zeros, in a shape that both masks fit."""
    n, m = draw(st.sampled_from(PATTERNS))
    shape = (m * draw(st.integers(1, 4)), m * draw(st.integers(1, 4)))
    values = draw(st.lists(st.integers(-3, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values, dtype=torch.float64).reshape(shape), n, m


def dense_mask(codes: torch.Tensor, size: int, n: int, m: int) -> torch.Tensor:
    return dense_twin(torch.ones(codes.shape[0], size // m * n), codes, n, m).bool()


@given(matrices())
def test_the_largest_are_kept_and_ties_go_to_the_lower_index(drawn: Any) -> None:
    matrix, n, m = drawn
    codes = keep(matrix.abs(), n, m)
    check_codes(codes, *matrix.shape, n, m)
    assert torch.equal(dense_mask(codes, matrix.shape[1], n, m), mask_by_loops(matrix.abs().tolist(), n, m))


@given(matrices())
def test_the_second_mask_keeps_zeros_inside_before_places_outside(drawn: Any) -> None:
    matrix, n, m = drawn
    codes = keep(matrix.abs(), n, m)
    first = dense_mask(codes, matrix.shape[1], n, m)
    values = matrix.gather(1, torch.tensor(columns_twin(codes, matrix.shape[1] // m * n, n, m)))
    second = keep_again(values, codes, n, m)
    check_codes(second, *matrix.shape[::-1], n, m)
    wanted = second_mask(matrix, first, n, m)
    assert torch.equal(dense_mask(second, matrix.shape[0], n, m).t(), wanted)
    packed = nm_transpose(values, codes, second, n, m)
    assert torch.equal(dense_twin(packed, second, n, m).t(), torch.where(first & wanted, matrix, 0.0))


def test_masks_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(24, 16)
    whole = keep(matrix, 2, 4)
    monkeypatch.setattr(pattern, "_MOST", 40)
    assert torch.equal(keep(matrix, 2, 4), whole)


@given(matrices(), st.data())
def test_codes_of_no_mask_are_refused(drawn: Any, data: st.DataObject) -> None:
    matrix, n, m = drawn
    (rows, size), codes = matrix.shape, keep(matrix.abs(), n, m)
    row, bit = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 8 * codes.shape[1] - 1))
    wrong = codes.clone()
    wrong[row, bit // 8] ^= 1 << bit % 8
    columns = columns_twin(wrong, size // m * n, n, m)
    groups = [[set(some[k : k + n]) for k in range(0, len(some), n)] for some in columns]
    ascending = all(some == sorted(some) for some in columns)
    inside = all(
        len(group) == n and group <= set(range(at * m, at * m + m)) for some in groups for at, group in enumerate(some)
    )
    if ascending and inside and bit < bits_of(m) * (size // m * n):
        check_codes(wrong, rows, size, n, m)
    else:
        with pytest.raises(MaskError, match=f"{n} of every {m} places"):
            check_codes(wrong, rows, size, n, m)
    for other in (codes[:, 1:], codes.int(), codes[1:]):
        with pytest.raises(MaskError, match=rf"for {n}:{m} of {rows} x {size}"):
            check_codes(other, rows, size, n, m)


@given(matrices())
def test_codes_are_made_of_columns(drawn: Any) -> None:
    matrix, n, m = drawn
    codes = keep(matrix.abs(), n, m)
    columns = torch.tensor(columns_twin(codes, matrix.shape[1] // m * n, n, m))
    assert torch.equal(codes_of(columns.short(), n, m), codes)
    for wrong in (columns - 1, columns + m, columns.flip(0) * m):
        if int(wrong.min()) < 0 or bool((wrong // m != columns // m).any()):
            with pytest.raises(MaskError, match=f"{n} of every {m} places"):
                codes_of(wrong, n, m)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 257), (2.0, 4), (True, 4)])
def test_patterns_that_cannot_be_used_are_refused(n: Any, m: Any) -> None:
    with pytest.raises(ArgumentError, match="1 <= n < m <= 256"):
        check_pattern(n, m)
