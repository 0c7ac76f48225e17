"""The N:M sparse product on the CPU: `nm_mm.cpp`, compiled for this processor on the first call.

The sparse product is there for float32. The dense matrix, which other dtypes and the other product need, is written by
the same library. Without a C++ compiler torch's own operations do all of it: correct, but slower.
"""

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.build.native import load
from sylva_compile.kernels.nm_mm import to_dense

log = logging.getLogger(__name__)

PER_THREAD = 1 << 20
"""Products of two numbers that are worth waking up a thread."""

_SIZES = (2, 4, 8)


def is_compiled() -> bool:
    """Return whether this machine has the compiled kernel; the first call compiles it or loads it from the cache."""
    return _library() is not None


def source() -> str:
    """Return the source of the kernel."""
    return Path(__file__).with_name("nm_mm.cpp").read_text()


def sparse_product(x: Tensor, values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return `x · Wᵀ` by the compiled kernel; shapes as in `sylva_compile.kernels.nm_mm`, all of float32.

    The result is the same, bit for bit, for any number of threads, and for a token whichever others are in `x`.

    Raises:
        IndexError: a column lies outside of W.
        MemoryError: there is no memory for a panel of tokens.
        NativeCompilerError: there is no compiled kernel; see `is_compiled`.
    """
    library = _library()
    if library is None:
        raise NativeCompilerError("The N:M product has no compiled kernel here; call `dense_product`.")
    tokens, (rows, per_row) = x.shape[0], values.shape
    if 0 in (tokens, in_features, rows, per_row):
        return torch.zeros((tokens, rows), dtype=x.dtype, device="cpu")
    values, columns = values.contiguous(), columns.contiguous()
    out = torch.empty((tokens, rows), dtype=x.dtype, device="cpu")
    failed = library.sylva_nm_mm(
        *(x.data_ptr(), tokens, in_features, *x.stride()),
        *(values.data_ptr(), columns.data_ptr(), columns.dtype == torch.int32, rows, per_row),
        *(_threads(tokens * rows * per_row), out.data_ptr()),
    )
    _check(failed, in_features)
    return out


def dense_product(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool = False) -> Tensor:
    """Return `x · Wᵀ`, or `x · W` if `transposed`, by way of the dense W; any dtype, shapes as for `sparse_product`."""
    dense = dense_matrix(values, columns, in_features)
    return (x @ dense if transposed else x @ dense.t()).contiguous()


def dense_matrix(values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return W, `[rows, in_features]`, in the dtype of `values`. Raises IndexError for a column outside of it."""
    library, (rows, per_row) = _library(), values.shape
    if library is None or 0 in (rows, per_row, in_features) or values.element_size() not in _SIZES:
        return to_dense(values, columns, in_features)
    values, columns = values.contiguous(), columns.contiguous()
    out = torch.empty((rows, in_features), dtype=values.dtype, device="cpu")
    failed = library.sylva_nm_dense(
        *(values.element_size(), values.data_ptr(), columns.data_ptr(), columns.dtype == torch.int32),
        *(rows, per_row, in_features, _threads(rows * in_features), out.data_ptr()),
    )
    _check(failed, in_features)
    return out


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // PER_THREAD))


def _check(failed: int, in_features: int) -> None:
    if failed == 1:
        raise IndexError(f"A column of the N:M matrix lies outside of its {in_features} columns.")
    if failed:
        raise MemoryError("No memory for a panel of sylva::nm_mm.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled kernel; log a warning and return None where it cannot be compiled."""
    try:
        library = load(source(), name="the N:M product")
    except NativeCompilerError as error:
        log.warning("N:M products run without their compiled kernel, as dense ones: correct, but slower. %s", error)
        return None
    size, pointer, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.sylva_nm_mm.argtypes = [
        *(pointer, size, size, size, size),
        *(pointer, pointer, flag, size, size),
        *(flag, pointer),
    ]
    library.sylva_nm_dense.argtypes = [*(flag, pointer, pointer, flag), *(size, size, size, flag, pointer)]
    library.sylva_nm_mm.restype = library.sylva_nm_dense.restype = flag
    return library
