"""Which n of every m neighbours are kept: by magnitude, ties to the lower index."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError, MaskError
from sylva_compile.kernels.nm_codes import are_codes, bytes_of, columns_of, pack, unpack

_MOST = 1 << 24
"""The most elements that are sorted at once: the indices of a sort take 8 bytes each."""


def check_pattern(n: int, m: int) -> None:
    """Raise ArgumentError unless n of m values can be kept."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (n, m))
    if not whole or not 1 <= n < m <= 256:
        raise ArgumentError(f"n={n!r}, m={m!r}; use integers with 1 <= n < m <= 256, such as n=2, m=4.")


def check_codes(codes: Tensor, rows: int, size: int, n: int, m: int) -> None:
    """Raise MaskError unless `codes` keep n of every m places, in ascending order, in each of `rows` rows of `size`."""
    per_row = size // m * n
    if size % m or not are_codes(codes, rows, per_row, n, m):
        raise MaskError(f"codes are {codes.dtype} {tuple(codes.shape)} for {n}:{m} of {rows} x {size}.")
    places = unpack(codes, per_row, m)
    groups = places.unflatten(1, (size // m, n))
    is_inside = not places.numel() or int(places.max()) < m
    is_ascending = bool((groups[..., 1:] > groups[..., :-1]).all())
    if not is_inside or not is_ascending or not torch.equal(pack(places, m), codes):
        raise MaskError(f"codes do not keep {n} of every {m} places in ascending order.")


def codes_of(columns: Tensor, n: int, m: int) -> Tensor:
    """Return the codes of `columns [rows, p]`, n ascending ones in each group of m. Raises MaskError for others."""
    if columns.shape[1] % n:
        raise MaskError(f"columns are {tuple(columns.shape)}, and not {n} of every {m}.")
    codes = columns.long() - torch.arange(0, columns.shape[1] // n * m, m, device=columns.device).repeat_interleave(n)
    if not bool(((codes >= 0) & (codes < m)).all()):
        raise MaskError(f"columns do not keep {n} of every {m} places in ascending order.")
    return pack(codes, m)


@torch.no_grad()
def keep(keys: Tensor, n: int, m: int) -> Tensor:
    """Return the codes (`sylva_compile.kernels.nm_codes`) of the n largest of every m neighbours in a row.

    Args:
        keys: `[rows, k]`, k a multiple of m. Among equal keys the one of the lower column is kept.
        n: how many are kept.
        m: out of how many.

    Returns:
        uint8 `[rows, bytes_of(k // m * n, m)]`, ascending in each group.
    """
    rows, k = keys.shape
    kept = keys.new_empty((rows, bytes_of(k // m * n, m)), dtype=torch.uint8)
    for part in _parts(rows, k):
        groups = keys[part].unflatten(1, (k // m, m))
        order = groups.sort(dim=2, descending=True, stable=True).indices[..., :n].sort(dim=2).values
        kept[part] = pack(order.flatten(1), m)
    return kept


def _parts(rows: int, k: int) -> Iterator[slice]:
    height = max(1, _MOST // max(k, 1))
    return (slice(start, start + height) for start in range(0, rows, height))


@torch.no_grad()
def keep_again(values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Prune a matrix that is N:M along its rows once more, along its columns: the mask C of SLoPe.

    A value inside of the first mask, even a zero, is kept before any place outside of it. So every m neighbours in a
    column keep n places, and those outside of the first mask hold zero.

    Args:
        values: `[out, in // m * n]`, the values that the first mask keeps.
        codes: their codes.
        n: how many places of m neighbours are kept, in both masks.
        m: out of how many; it divides `out` and `in`.

    Returns:
        The codes of the rows that each column keeps, uint8 `[in, bytes_of(out // m * n, m)]`.
    """
    at = columns_of(codes, values.shape[1], n, m).long()
    keys = values.new_full((values.shape[0], values.shape[1] // n * m), -1.0)
    return keep(keys.scatter_(1, at, values.detach().abs()).t(), n, m)
