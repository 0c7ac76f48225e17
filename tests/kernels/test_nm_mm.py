import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sylva_compile.kernels.nm_mm import nm_mm
from sylva_compile.nm.pattern import keep

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def operands(rows: int, groups: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, values, columns and the dense matrix that they stand for."""
    dense = torch.randn(rows, groups * 4)
    columns = keep(dense.abs(), 2, 4)
    mask = torch.zeros_like(dense).scatter_(1, columns.long(), 1.0)
    dense = (dense * mask).to(dtype)
    return torch.randn(tokens, groups * 4).to(dtype), dense.gather(1, columns.long()), columns, dense


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 7), st.sampled_from(DTYPES))
def test_is_the_dense_product(rows: int, groups: int, tokens: int, dtype: torch.dtype) -> None:
    x, values, columns, dense = operands(rows, groups, tokens, dtype)
    tolerance = {} if dtype in (torch.float64, torch.float32) else {"rtol": 2e-2, "atol": 2e-2}
    size = dense.shape[1]
    torch.testing.assert_close(nm_mm(x, values, columns, size, False), x @ dense.t(), **tolerance)
    gy = torch.randn(tokens, rows).to(dtype)
    torch.testing.assert_close(nm_mm(gy, values, columns, size, True), gy @ dense, **tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_is_well_formed(transposed: bool) -> None:
    x, values, columns, dense = operands(6, 3, 5, torch.float32)
    x = torch.randn(6, 5).t() if transposed else x
    torch.library.opcheck(nm_mm, (x, values, columns, dense.shape[1], transposed))
    assert nm_mm(x, values, columns, dense.shape[1], transposed).is_contiguous()
