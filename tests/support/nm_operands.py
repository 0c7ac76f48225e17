"""N:M sparse matrices for tests: their values and codes, and the dense twin in float64, element by element."""

import torch
from torch import Tensor

from sylva_compile.kernels.nm_codes import pack

PATTERNS = [(1, 2), (2, 4), (1, 4), (2, 8)]


def nm_operand(
    rows: int, in_features: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return `values [rows, in_features / m * n]` and their codes, n random places in every group of m."""
    groups = in_features // m
    places = torch.rand(rows, groups, m, generator=generator).argsort(2)[..., :n].sort(2).values.flatten(1)
    values = torch.randn(places.shape, generator=generator).to(dtype)
    return values, pack(places, m)


def columns_twin(codes: Tensor, per_row: int, n: int, m: int) -> list[list[int]]:
    """Return the column of each value, read from the bits one by one."""
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    columns = []
    for row in codes.tolist():
        number = sum(byte << (8 * i) for i, byte in enumerate(row))
        columns.append([k // n * m + (number >> (bits * k)) % (1 << bits) for k in range(per_row)])
    return columns


def dense_twin(values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return the matrix in float64, element by element."""
    rows, per_row = values.shape
    dense = torch.zeros(rows, per_row // n * m, dtype=torch.float64)
    for row, (some, places) in enumerate(zip(values.tolist(), columns_twin(codes, per_row, n, m), strict=True)):
        for value, place in zip(some, places, strict=True):
            dense[row, place] = value
    return dense
