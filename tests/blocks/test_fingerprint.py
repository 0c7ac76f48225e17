"""A fingerprint changes with every bit, with order and with dtype, and with nothing else."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sylva_compile.blocks.fingerprint import checksum


@settings(deadline=None)
@given(size=st.integers(1, 200), place=st.integers(0, 199), bit=st.integers(0, 31))
def test_every_bit_counts(size: int, place: int, bit: int) -> None:
    tensor = torch.randn(size)
    before = checksum(tensor)
    flipped = tensor.clone()
    mask = torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int64).to(torch.int32)
    flipped.view(torch.int32)[place % size] ^= mask
    assert checksum(flipped) != before
    assert checksum(tensor.clone()) == before


def test_order_counts() -> None:
    tensor = torch.arange(64.0)
    assert checksum(tensor) != checksum(tensor.flip(0))


def test_sizes_that_are_no_multiple_of_a_word() -> None:
    tensors = [torch.zeros(size, dtype=torch.bfloat16) for size in range(9)]
    assert len({checksum(tensor) for tensor in tensors}) == 9


def test_strides_do_not_count() -> None:
    tensor = torch.randn(12, 20)
    assert checksum(tensor) == checksum(tensor.t().contiguous().t())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.int64])
def test_a_slice_is_what_its_copy_is(dtype: torch.dtype) -> None:
    whole = torch.arange(60).reshape(20, 3).to(dtype)
    for start in range(6):
        piece = whole[start : start + 9]
        assert checksum(piece) == checksum(piece.clone())


def test_large_tensors_are_read_in_pieces() -> None:
    tensor = torch.randn(9_000_001)
    other = tensor.clone()
    other[-2] += 1
    assert checksum(tensor) != checksum(other)
