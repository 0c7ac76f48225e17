"""Values moved between the places of N:M sparse matrices and dense ones on the CPU, by `places.cpp`.

torch's own operations take 64-bit indices and run on one element at a time: they cost as much as the products. They do
the work where there is no C++ compiler.
"""

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm import libraries
from sylva_compile.kernels.nm_codes import are_codes
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.kernels.nm_sample import nm_sample_reference
from sylva_compile.kernels.nm_transpose import nm_transpose_reference

_SIZES = (2, 4, 8)
_CHUNK = 1 << 22
"""Elements of a dense product that are computed before its kept places are read."""


def dense_matrix(values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return W, `[rows, p / n * m]`, in the dtype of `values [rows, p]`.

    Raises:
        IndexError: a place lies outside of its group.
    """
    library, (rows, per_row) = libraries.places(), values.shape
    if library is None or 0 in (rows, per_row) or values.element_size() not in _SIZES:
        return to_dense(values, codes, n, m)
    values, codes, in_features = values.contiguous(), codes.contiguous(), per_row // n * m
    out = torch.empty((rows, in_features), dtype=values.dtype, device="cpu")
    failed = library.sylva_nm_dense(
        *(values.element_size(), n, m),
        *(values.data_ptr(), codes.data_ptr(), rows, per_row, in_features),
        *(libraries.threads_for_moves(rows * in_features), out.data_ptr()),
    )
    libraries.check(failed, m)
    return out


def nm_sample_cpu(lhs: Tensor, rhs: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return elements of `lhsᵀ · rhs`; arguments as in `sylva_compile.kernels.nm_sample`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a place lies outside of its group.
    """
    (tokens, rows), in_features = lhs.shape, rhs.shape[1]
    per_row = in_features // m * n
    is_one_kind = rhs.shape[0] == tokens and lhs.dtype == rhs.dtype and in_features % m == 0
    if not is_one_kind or not are_codes(codes, rows, per_row, n, m):
        raise ArgumentError(
            f"lhs {tuple(lhs.shape)} of {lhs.dtype}, rhs {tuple(rhs.shape)} of {rhs.dtype}, codes "
            f"{tuple(codes.shape)} of {codes.dtype}; give operands of one dtype and as many tokens, and for each of "
            f"the {rows} rows the uint8 codes of {n} in every {m} columns."
        )
    library = libraries.places()
    out = torch.empty((rows, per_row), dtype=lhs.dtype, device="cpu")
    if 0 in (rows, per_row):
        return out
    codes, height = codes.contiguous(), max(1, _CHUNK // in_features)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        # Autocast, which may be on, would compute this product in another dtype.
        with torch.autocast("cpu", enabled=False):
            if library is None or lhs.element_size() not in _SIZES:
                out[part] = nm_sample_reference(lhs[:, part], rhs, codes[part], n, m)
                continue
            product = (lhs[:, part].t() @ rhs).contiguous()
        failed = library.sylva_nm_gather(
            *(product.element_size(), n, m),
            *(product.data_ptr(), codes[part].data_ptr(), len(product), per_row, in_features),
            *(libraries.threads_for_moves(len(product) * per_row), out[part].data_ptr()),
        )
        libraries.check(failed, m)
    return out


def nm_transpose_cpu(
    values: Tensor, codes: Tensor, second: Tensor, n: int, m: int, after: Tensor | None = None
) -> Tensor:
    """Return the values of a transposed matrix; arguments as in `sylva_compile.kernels.nm_transpose`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a place lies outside of its group.
    """
    (rows, per_row), in_features, kept = values.shape, second.shape[0], values.shape[0] // m * n
    fits = are_codes(codes, rows, per_row, n, m) and are_codes(second, in_features, kept, n, m)
    if not fits or rows % m or in_features * n != per_row * m:
        raise ArgumentError(
            f"values {tuple(values.shape)}, codes {tuple(codes.shape)} of {codes.dtype}, second {tuple(second.shape)} "
            f"of {second.dtype}; give {n} values for every {m} of the {in_features} columns, and uint8 codes of both "
            f"masks, {n} of every {m}."
        )
    library = libraries.places()
    if library is None or 0 in (rows, in_features) or values.element_size() not in _SIZES:
        return nm_transpose_reference(values, codes, second, n, m)
    values, codes, second = values.contiguous(), codes.contiguous(), second.contiguous()
    out = torch.empty((in_features, kept), dtype=values.dtype, device="cpu")
    failed = library.sylva_nm_transpose(
        *(values.element_size(), n, m),
        *(values.data_ptr(), codes.data_ptr(), second.data_ptr()),
        *(rows, per_row, in_features, kept),
        *(libraries.threads_for_moves(out.numel()), out.data_ptr()),
    )
    libraries.check(failed, m)
    return out
