"""Which n of every m neighbours are kept: by magnitude, ties to the lower index."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm_mm import column_dtype
from sylva_compile.kernels.nm_transpose import OUTSIDE

_MOST = 1 << 24
"""The most elements that are sorted at once: the indices of a sort take 8 bytes each."""


def check_pattern(n: int, m: int) -> None:
    """Raise ArgumentError unless n of m values can be kept."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (n, m))
    if not whole or not 1 <= n < m <= 256:
        raise ArgumentError(f"n={n!r}, m={m!r}; use integers with 1 <= n < m <= 256, such as n=2, m=4.")


@torch.no_grad()
def keep(keys: Tensor, n: int, m: int) -> Tensor:
    """Return the columns of the n largest of every m neighbours in a row.

    Args:
        keys: `[rows, k]`, k a multiple of m. Among equal keys the one of the lower column is kept.
        n: how many are kept.
        m: out of how many.

    Returns:
        int16 or int32 `[rows, k // m * n]`, ascending in each row.
    """
    rows, k = keys.shape
    kept = keys.new_empty((rows, k // m * n), dtype=column_dtype(k))
    first = torch.arange(0, k, m, device=keys.device)[:, None]
    for part in _parts(rows, k):
        groups = keys[part].unflatten(1, (k // m, m))
        order = groups.sort(dim=2, descending=True, stable=True).indices[..., :n].sort(dim=2).values
        kept[part] = (order + first).flatten(1).to(kept.dtype)
    return kept


def _parts(rows: int, k: int) -> Iterator[slice]:
    height = max(1, _MOST // max(k, 1))
    return (slice(start, start + height) for start in range(0, rows, height))


@torch.no_grad()
def keep_again(values: Tensor, columns: Tensor, in_features: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Prune a matrix that is N:M along its rows once more, along its columns: the mask C of SLoPe.

    A value inside of the first mask, even a zero, is kept before any place outside of it. So every m neighbours in a
    column keep n places, and those outside of the first mask hold zero.

    Args:
        values: `[out, in // m * n]`, the values that the first mask keeps.
        columns: their columns, `[out, in // m * n]`.
        in_features: in.
        n: how many places of m neighbours are kept, in both masks.
        m: out of how many; it divides `out` and `in`.

    Returns:
        The rows that each column keeps, int16 or int32 `[in, out // m * n]`, ascending; and the slot of each: its index
        among the n values of its group in its row, uint8, `OUTSIDE` where the first mask keeps nothing.
    """
    at = columns.long()
    keys = values.new_full((values.shape[0], in_features), -1.0).scatter_(1, at, values.detach().abs())
    rows = keep(keys.t(), n, m)
    slots = torch.full(keys.shape, OUTSIDE, dtype=torch.uint8, device=values.device)
    slot = (torch.arange(columns.shape[1], device=values.device) % n).to(torch.uint8)
    slots.scatter_(1, at, slot.expand(columns.shape))
    return rows, slots.t().gather(1, rows.long())
