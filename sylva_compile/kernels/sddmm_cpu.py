"""SDDMM on the CPU: one small GEMM for each run of neighbouring blocks, straight from the operands' own memory.

No dense `m x n` product and no copy of an operand is made. Operands narrower than float32 are widened a panel of b
columns at a time, so that sums are float32 and the widened panel stays in cache.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype


def sddmm_cpu(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Blocks of `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm`."""
    m, n = lhs.shape[1], rhs.shape[1]
    wide = block_dtype(lhs.dtype)
    out = torch.zeros((positions.shape[1], block_size, block_size), dtype=wide)
    rows, cols = positions.tolist()
    panel_of, panel = -1, lhs
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and rows[stop] == rows[start] and cols[stop] == cols[stop - 1] + 1:
            stop += 1
        row, col = rows[start] * block_size, cols[start] * block_size
        if panel_of != row:
            panel_of, panel = row, lhs[:, row : row + block_size].to(wide).t()
        width = min(col + (stop - start) * block_size, n) - col
        height = min(block_size, m - row)
        product = panel @ rhs[:, col : col + width].to(wide)
        for k in range(start, stop):
            at = (k - start) * block_size
            piece = product[:, at : at + block_size]
            out[k, :height, : piece.shape[1]] = piece
        start = stop
    return out
