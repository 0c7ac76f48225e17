"""`sylva::nm_mm`: the product of a dense matrix and an N:M sparse one.

The sparse matrix `W [rows, in_features]` keeps at most n of every m neighbours in a row. It is given as
`values [rows, p]` and their columns, `W[i, columns[i, k]] = values[i, k]`; every other element is zero. The op knows
neither n nor m.

This module imports torch alone; the first call on a device loads its kernels. `sylva_compile.kernels.nm.choice` says
which of them computes a shape.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.lazy import on_first_call


def column_dtype(size: int) -> torch.dtype:
    """Return the narrowest dtype for the columns of a matrix with `size` of them: int16 or int32."""
    return torch.int16 if size <= 1 << 15 else torch.int32


def to_dense(values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return the matrix W `[rows, in_features]` that `values` and `columns`, `[rows, p]`, stand for."""
    return values.new_zeros((values.shape[0], in_features)).scatter_(1, columns.long(), values)


def nm_mm_reference(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> Tensor:
    """Return the product by way of the dense matrix, as an oracle. Arguments as those of `nm_mm`."""
    dense = to_dense(values, columns, in_features)
    return (x @ dense if transposed else x @ dense.t()).contiguous()


@torch.library.custom_op("sylva::nm_mm", mutates_args=())
def nm_mm(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ`, or `x · W` if `transposed`.

    Args:
        x: `[T, in_features]`, or `[T, rows]` if `transposed`; any strides.
        values: `[rows, p]`, in the dtype of `x`.
        columns: int16 or int32 `[rows, p]`: the column of each value, ascending and each once in a row. On CUDA,
            `[rows, 0]` if `values` is a matrix that `sylva_compile.kernels.nm.cuda.compress` has returned.
        in_features: the number of columns of W.
        transposed: which of the two products.

    Returns:
        `[T, rows]`, or `[T, in_features]` if `transposed`; contiguous, in the dtype of `x`.
    """
    return nm_mm_reference(x, values, columns, in_features, transposed)


@nm_mm.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], in_features if transposed else values.shape[0]))


nm_mm.register_kernel("cpu")(on_first_call("sylva_compile.kernels.nm.products", "nm_mm_cpu"))
nm_mm.register_kernel("cuda")(on_first_call("sylva_compile.kernels.nm.products", "nm_mm_cuda"))
