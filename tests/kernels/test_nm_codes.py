"""Codes of N:M places against loops over their bits."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from nm_operands import PATTERNS, columns_twin
from torch import Tensor

from sylva_compile.kernels.nm_codes import are_codes, bits_of, bytes_of, column_dtype, columns_of, pack, unpack


@st.composite
def places(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Draw rows of codes, n ascending ones in each group of m."""
    n, m = draw(st.sampled_from([*PATTERNS, (3, 4), (3, 5), (1, 16), (2, 17), (3, 256)]))
    groups = draw(st.integers(0, 9))
    group = st.lists(st.integers(0, m - 1), min_size=n, max_size=n, unique=True).map(sorted)
    rows = draw(st.lists(st.lists(group, min_size=groups, max_size=groups), min_size=1, max_size=4))
    return [[code for group in row for code in group] for row in rows], n, m


@given(places(), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_packed_codes_are_unpacked_again(drawn: tuple[list[list[int]], int, int], dtype: torch.dtype) -> None:
    rows, n, m = drawn
    codes = torch.tensor(rows, dtype=dtype).reshape(len(rows), -1)
    packed = pack(codes, m)
    assert packed.is_contiguous() and are_codes(packed, len(rows), codes.shape[1], n, m)
    found = unpack(packed, codes.shape[1], m)
    assert found.dtype == torch.uint8 and torch.equal(found.long(), codes.long())
    columns = [[k // n * m + code for k, code in enumerate(row)] for row in rows]
    assert columns_twin(packed, codes.shape[1], n, m) == columns
    assert columns_of(packed, codes.shape[1], n, m).tolist() == columns


@pytest.mark.parametrize(
    ("m", "bits", "size"), [(2, 2, 3), (4, 2, 3), (5, 4, 5), (16, 4, 5), (17, 8, 10), (256, 8, 10)]
)
def test_a_code_takes_as_few_bits_as_m_allows(m: int, bits: int, size: int) -> None:
    assert bits_of(m) == bits and bytes_of(10, m) == size
    last = torch.full((1, 10), m - 1)
    packed = pack(last, m)
    assert packed.shape == (1, size) and torch.equal(unpack(packed, 10, m).long(), last)


def test_bits_that_are_left_over_are_zero() -> None:
    assert pack(torch.tensor([[3, 3, 3, 3, 3]]), 4).tolist() == [[0b11111111, 0b00000011]]
    assert pack(torch.tensor([[15, 15, 15]]), 16).tolist() == [[0xFF, 0x0F]]


def test_columns_are_as_narrow_as_they_may_be() -> None:
    assert column_dtype(1 << 15) == torch.int16 and column_dtype((1 << 15) + 4) == torch.int32
    last = columns_of(pack(torch.full((1, 8194), 3), 4), 8194, 1, 4)
    assert last.dtype == torch.int32 and int(last[0, -1]) == 8194 * 4 - 1


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
def test_codes_of_any_strides_are_packed(strides: str) -> None:
    codes = torch.arange(35).reshape(5, 7) % 4
    given_: Tensor = {
        "contiguous": codes,
        "transposed": codes.t().contiguous().t(),
        "sliced": torch.stack([codes, codes], 2)[..., 1],
    }[strides]
    assert torch.equal(pack(given_, 4), pack(codes, 4))


@pytest.mark.parametrize(
    ("shape", "pattern"), [((3, 2), (2, 4)), ((3, 1), (0, 4)), ((3, 1), (2, 257)), ((3, 1), (3, 4)), ((2, 1), (2, 4))]
)
def test_what_cannot_be_codes(shape: tuple[int, int], pattern: tuple[int, int]) -> None:
    assert are_codes(torch.zeros((3, 1), dtype=torch.uint8), 3, 4, 2, 4)
    assert not are_codes(torch.zeros(shape, dtype=torch.uint8), 3, 4, *pattern)
    assert not are_codes(torch.zeros((3, 1), dtype=torch.int8), 3, 4, 2, 4)
