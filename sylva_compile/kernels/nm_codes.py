"""The places of N:M sparse values, as codes of a few bits.

A row of an N:M sparse matrix keeps n places in every group of m neighbours, so that value k of a row lies in group
`k // n`, and only its place within that group has to be stored:

    column(k) = k // n * m + code(k),    code(k) < m

Codes take 2, 4 or 8 bits, for m up to 4, 16 and 256. Those of a row fill whole bytes, the first in the lowest bits;
bits that are left over in the last byte are zero. At 2:4 a value thus takes a quarter of a byte besides its own.

This module imports torch alone. `sylva_compile/kernels/nm/codes.cpp` reads the same format.
"""

import torch
from torch import Tensor


def bits_of(m: int) -> int:
    """Return the bits of a code among m places."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def bytes_of(per_row: int, m: int) -> int:
    """Return the bytes of a row with `per_row` codes among m places."""
    return -(-per_row * bits_of(m) // 8)


def are_codes(codes: Tensor, rows: int, per_row: int, n: int, m: int) -> bool:
    """Return whether `codes` have the shape and dtype of those of values `[rows, per_row]`, n of every m."""
    fits = 1 <= n <= m <= 256 and per_row % n == 0
    return fits and codes.shape == (rows, bytes_of(per_row, m)) and codes.dtype == torch.uint8


def pack(codes: Tensor, m: int) -> Tensor:
    """Return codes in the format of this module.

    Args:
        codes: integers `[rows, p]`, each below m.
        m: the number of places in a group.

    Returns:
        uint8 `[rows, bytes_of(p, m)]`, contiguous.
    """
    bits = bits_of(m)
    each = 8 // bits
    parts = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % each))
    parts = parts.unflatten(1, (bytes_of(codes.shape[1], m), each))
    packed: Tensor = parts[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, each):
        packed |= parts[..., i] << (i * bits)
    return packed


def unpack(packed: Tensor, per_row: int, m: int) -> Tensor:
    """Return the codes that `pack` was given, uint8 `[rows, per_row]`."""
    bits = bits_of(m)
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, 2).flatten(1)[:, :per_row]


def column_dtype(size: int) -> torch.dtype:
    """Return the narrowest dtype for the columns of a matrix with `size` of them: int16 or int32."""
    return torch.int16 if size <= 1 << 15 else torch.int32


def columns_of(packed: Tensor, per_row: int, n: int, m: int) -> Tensor:
    """Return the column of each value, int16 or int32 `[rows, per_row]`."""
    first = torch.arange(0, per_row // n * m, m, device=packed.device).repeat_interleave(n)
    dtype = column_dtype(per_row // n * m)
    return unpack(packed, per_row, m).to(dtype) + first.to(dtype)
