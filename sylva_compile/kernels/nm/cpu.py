"""Products with an N:M sparse matrix on the CPU: a compiled kernel, and one by way of the dense matrix."""

import torch
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.nm import libraries
from sylva_compile.kernels.nm.places import dense_matrix

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of the compiled kernel, which adds in float32."""


def is_compiled() -> bool:
    """Return whether this machine has the compiled kernel; the first call compiles it or loads it from the cache."""
    return libraries.products() is not None


def sparse_product(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return `x · Wᵀ` by the compiled kernel; shapes as in `sylva_compile.kernels.nm_mm`, all of one of DTYPES.

    The result is the same, bit for bit, for any number of threads, and for a token whichever others are in `x`.

    Raises:
        IndexError: a place lies outside of its group.
        MemoryError: there is no memory for a panel of tokens.
        NativeCompilerError: there is no compiled kernel; see `is_compiled`.
    """
    library = libraries.products()
    if library is None:
        raise NativeCompilerError("The N:M product has no compiled kernel here; call `dense_product`.")
    (tokens, in_features), (rows, per_row) = x.shape, values.shape
    if 0 in (tokens, rows, per_row):
        return torch.zeros((tokens, rows), dtype=x.dtype, device="cpu")
    values, codes = values.contiguous(), codes.contiguous()
    out = torch.empty((tokens, rows), dtype=x.dtype, device="cpu")
    failed = library.sylva_nm_mm(
        *(x.element_size(), x.data_ptr(), tokens, in_features, *x.stride()),
        *(values.data_ptr(), codes.data_ptr(), n, m, rows, per_row),
        *(libraries.threads_for_products(tokens * rows * per_row), out.data_ptr()),
    )
    libraries.check(failed, m)
    return out


def dense_product(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool = False) -> Tensor:
    """Return `x · Wᵀ`, or `x · W` if `transposed`, by way of the dense W; any dtype, shapes as for `sparse_product`."""
    dense = dense_matrix(values, codes, n, m)
    return (x @ dense if transposed else x @ dense.t()).contiguous()
