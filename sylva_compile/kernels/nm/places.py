"""Values moved between the places of N:M sparse matrices and dense ones on the CPU, by `places.cpp`.

torch's own operations take 64-bit indices and run on one element at a time: they cost as much as the products. They do
the work where there is no C++ compiler.
"""

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm import libraries
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.kernels.nm_transpose import nm_transpose_reference

_SIZES = (2, 4, 8)
_CHUNK = 1 << 22
"""Elements of a dense product that are computed before its kept places are read."""


def dense_matrix(values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return W, `[rows, in_features]`, in the dtype of `values`. Raises IndexError for a column outside of it."""
    library, (rows, per_row) = libraries.places(), values.shape
    if library is None or 0 in (rows, per_row, in_features) or values.element_size() not in _SIZES:
        return to_dense(values, columns, in_features)
    values, columns = values.contiguous(), columns.contiguous()
    out = torch.empty((rows, in_features), dtype=values.dtype, device="cpu")
    failed = library.sylva_nm_dense(
        *libraries.kind(values, columns),
        *(values.data_ptr(), columns.data_ptr(), rows, per_row, in_features),
        *(libraries.threads_for_moves(rows * in_features), out.data_ptr()),
    )
    libraries.check(failed, in_features)
    return out


def nm_sample_cpu(lhs: Tensor, rhs: Tensor, columns: Tensor) -> Tensor:
    """Return elements of `lhsᵀ · rhs`; arguments as in `sylva_compile.kernels.nm_sample`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a column lies outside of the product.
    """
    tokens, (rows, per_row) = lhs.shape[0], columns.shape
    if rhs.shape[0] != tokens or lhs.shape[1] != rows or lhs.dtype != rhs.dtype or not _is_index(columns):
        raise ArgumentError(
            f"lhs {tuple(lhs.shape)} of {lhs.dtype}, rhs {tuple(rhs.shape)} of {rhs.dtype}, columns "
            f"{tuple(columns.shape)} of {columns.dtype}; give operands of one dtype and as many tokens, and int16 or "
            "int32 columns for each row."
        )
    library, in_features = libraries.places(), rhs.shape[1]
    out = torch.empty(columns.shape, dtype=lhs.dtype, device="cpu")
    if 0 in (rows, per_row, in_features):
        return out
    columns, height = columns.contiguous(), max(1, _CHUNK // in_features)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        # Autocast, which may be on, would compute this product in another dtype.
        with torch.autocast("cpu", enabled=False):
            product = (lhs[:, part].t() @ rhs).contiguous()
        if library is None or lhs.element_size() not in _SIZES:
            out[part] = product.gather(1, columns[part].long())
            continue
        failed = library.sylva_nm_gather(
            *libraries.kind(product, columns),
            *(product.data_ptr(), columns[part].data_ptr(), len(product), per_row, in_features),
            *(libraries.threads_for_moves(len(product) * per_row), out[part].data_ptr()),
        )
        libraries.check(failed, in_features)
    return out


def nm_transpose_cpu(
    values: Tensor, places: Tensor, slots: Tensor, n: int, m: int, after: Tensor | None = None
) -> Tensor:
    """Return the values of a transposed matrix; arguments as in `sylva_compile.kernels.nm_transpose`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a place lies outside of W.
    """
    (rows, per_row), (in_features, kept) = values.shape, places.shape
    fits = slots.shape == places.shape and slots.dtype == torch.uint8 and _is_index(places) and 1 <= n <= m
    if not fits or in_features % m or in_features * n != per_row * m:
        raise ArgumentError(
            f"values {tuple(values.shape)}, places {tuple(places.shape)} of {places.dtype}, slots "
            f"{tuple(slots.shape)} of {slots.dtype}; give {n} values for every {m} of the {in_features} columns, int16 "
            "or int32 places, and a uint8 slot for each."
        )
    library = libraries.places()
    if library is None or 0 in (rows, in_features, kept) or values.element_size() not in _SIZES:
        return nm_transpose_reference(values, places, slots, n, m)
    values, places, slots = values.contiguous(), places.contiguous(), slots.contiguous()
    out = torch.empty(places.shape, dtype=values.dtype, device="cpu")
    failed = library.sylva_nm_transpose(
        *libraries.kind(values, places),
        *(values.data_ptr(), places.data_ptr(), slots.data_ptr()),
        *(rows, per_row, in_features, kept, n, m),
        *(libraries.threads_for_moves(places.numel()), out.data_ptr()),
    )
    libraries.check(failed, rows)
    return out


def _is_index(places: Tensor) -> bool:
    return places.dtype in (torch.int16, torch.int32)
