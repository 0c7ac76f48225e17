"""`sylva::nm_mm`: the product of a dense matrix and an N:M sparse one.

The sparse matrix `W [rows, in_features]` keeps n of every m neighbours in a row. It is given as `values [rows, p]`,
p = in_features / m * n, and the codes of their places (`sylva_compile.kernels.nm_codes`). Every other element is zero.

This module imports torch alone; the first call on a device loads its kernels. `sylva_compile.kernels.nm.choice` says
which of them computes a shape.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.lazy import on_first_call
from sylva_compile.kernels.nm_codes import columns_of


def to_dense(values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return the matrix W `[rows, p / n * m]` that `values [rows, p]` and their codes stand for."""
    rows, per_row = values.shape
    columns = columns_of(codes, per_row, n, m)
    return values.new_zeros((rows, per_row // n * m)).scatter_(1, columns.long(), values)


def nm_mm_reference(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> Tensor:
    """Return the product by way of the dense matrix, as an oracle. Arguments as those of `nm_mm`."""
    dense = to_dense(values, codes, n, m)
    return (x @ dense if transposed else x @ dense.t()).contiguous()


@torch.library.custom_op("sylva::nm_mm", mutates_args=())
def nm_mm(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ`, or `x · W` if `transposed`.

    Args:
        x: `[T, in_features]`, or `[T, rows]` if `transposed`; any strides.
        values: `[rows, p]`, in the dtype of `x`.
        codes: their codes, uint8 `[rows, bytes_of(p, m)]`, ascending in each group. On CUDA, `[rows, 0]` if `values` is
            a matrix that `sylva_compile.kernels.nm.cuda.compress` has returned.
        n: how many places of a group are kept.
        m: out of how many, 256 at most.
        transposed: which of the two products.

    Returns:
        `[T, rows]`, or `[T, in_features]` if `transposed`; contiguous, in the dtype of `x`.
    """
    return nm_mm_reference(x, values, codes, n, m, transposed)


@nm_mm.register_fake
def _(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[1] // n * m if transposed else values.shape[0]))


nm_mm.register_kernel("cpu")(on_first_call("sylva_compile.kernels.nm.products", "nm_mm_cpu"))
nm_mm.register_kernel("cuda")(on_first_call("sylva_compile.kernels.nm.products", "nm_mm_cuda"))
