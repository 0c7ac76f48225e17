"""N:M sparse matrices for tests: their values and columns, and the dense twin in float64."""

import torch
from torch import Tensor

PATTERNS = [(1, 2), (2, 4), (1, 4), (2, 8)]


def nm_operand(
    rows: int, in_features: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return `values [rows, in_features / m * n]` and their columns, n random ones in every group of m."""
    groups = in_features // m
    order = torch.rand(rows, groups, m, generator=generator).argsort(2)[..., :n].sort(2).values
    columns = (order + torch.arange(0, in_features, m)[:, None]).flatten(1)
    values = torch.randn(columns.shape, generator=generator).to(dtype)
    return values, columns.to(torch.int16 if in_features <= 1 << 15 else torch.int32)


def dense_twin(values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return the matrix in float64, element by element."""
    dense = torch.zeros(values.shape[0], in_features, dtype=torch.float64)
    for row, (some, places) in enumerate(zip(values.tolist(), columns.tolist(), strict=True)):
        for value, place in zip(some, places, strict=True):
            dense[row, place] = value
    return dense
