"""Small functions about places of blocks and the values that they leave."""

from collections.abc import Sequence

import torch
from torch import Tensor


def where(places: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the index among `places int64[2, k]` of each place in `wanted int64[2, n]`, or -1: `int64[n]`."""
    index = torch.full(grid, -1, dtype=torch.int64, device="cpu")
    index[places[0], places[1]] = torch.arange(places.shape[1], device="cpu")
    return index[wanted[0], wanted[1]]


def zero_outside(blocks: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `blocks [nnz, b, b]` at `positions int64[2, nnz]` with zeros beyond the edges of a weight of `shape`."""
    b, (m, n) = blocks.shape[-1], shape
    if m % b == 0 and n % b == 0:
        return blocks
    lane = torch.arange(b, device=blocks.device)
    row_inside = positions[0][:, None] * b + lane < m
    col_inside = positions[1][:, None] * b + lane < n
    return torch.where(row_inside[:, :, None] & col_inside[:, None, :], blocks, 0)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 `values` rounded up or down to bfloat16, so that the expectation is exact; still float32."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device="cpu")
    bits = values.float().view(torch.int32)
    # The lower 16 bits of a float32 are those that bfloat16 lacks.
    rounded = (bits + noise.to(bits.device)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
