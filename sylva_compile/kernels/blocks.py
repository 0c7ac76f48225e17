"""How blocks sit in a matrix: the plain gather and scatter that every kernel agrees with.

A matrix `[m, n]` is tiled by `b x b` blocks from its upper left corner. Positions are `int64[2, nnz]`: block rows,
then block columns. Blocks are `[nnz, b, b]` in that order. Where b does not divide m or n, the last block row or column
reaches over the edge: its outside reads as zero and is never written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_shape(shape: tuple[int, int] | torch.Size, block_size: int) -> tuple[int, int]:
    """Number of block rows and block columns that cover a matrix of `shape`."""
    return -(-shape[0] // block_size), -(-shape[1] // block_size)


def block_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of blocks that train a weight of `dtype`: float32, or float64 for a float64 weight."""
    return torch.promote_types(dtype, torch.float32)


def read_blocks(matrix: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Copy the blocks at `positions` out of `matrix [m, n]`; returns `[nnz, b, b]` in the matrix's dtype."""
    m, n = matrix.shape
    mb, nb = grid_shape(matrix.shape, block_size)
    if m % block_size or n % block_size:
        matrix = F.pad(matrix, (0, nb * block_size - n, 0, mb * block_size - m))
    tiles: Tensor = matrix.unflatten(1, (nb, block_size)).unflatten(0, (mb, block_size)).transpose(1, 2)
    return tiles[positions[0], positions[1]]


class BlockWriter:
    """Writes blocks into one matrix shape in place; everything outside the blocks stays bit for bit as it is.

    Blocks that lie inside, over the right edge, over the lower edge and over the corner are four strided views of the
    matrix, so that no element index is ever stored. Which block belongs to which view is found once, here.
    """

    def __init__(self, shape: tuple[int, int] | torch.Size, positions: Tensor, block_size: int) -> None:
        """`positions int64[2, nnz]` on any device; reading them waits for that device."""
        self.shape, self.block_size = (int(shape[0]), int(shape[1])), block_size
        inner_rows, inner_cols = (size // block_size for size in self.shape)
        over_right = positions[1] >= inner_cols
        over_bottom = positions[0] >= inner_rows
        self._parts: list[tuple[slice, slice, Tensor, Tensor, Tensor | None]] = []
        for below, right in ((False, False), (False, True), (True, False), (True, True)):
            chosen = (over_bottom == below) & (over_right == right)
            if not bool(chosen.any()):
                continue
            at_row = slice(inner_rows * block_size, None) if below else slice(0, inner_rows * block_size)
            at_col = slice(inner_cols * block_size, None) if right else slice(0, inner_cols * block_size)
            rows = positions[0][chosen] - (inner_rows if below else 0)
            cols = positions[1][chosen] - (inner_cols if right else 0)
            index = None if bool(chosen.all()) else chosen.nonzero().squeeze(1)
            self._parts.append((at_row, at_col, rows, cols, index))

    def to(self, device: torch.device) -> "BlockWriter":
        """Move the index tensors to `device`, in place."""
        self._parts = [
            (at_row, at_col, rows.to(device), cols.to(device), None if index is None else index.to(device))
            for at_row, at_col, rows, cols, index in self._parts
        ]
        return self

    @torch.no_grad()
    def write(self, matrix: Tensor, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]`, rounded to the matrix's dtype, into `matrix [m, n]` in place."""
        b = self.block_size
        for at_row, at_col, rows, cols, index in self._parts:
            strip = matrix[at_row, at_col]
            height, width = min(b, strip.shape[0]), min(b, strip.shape[1])
            tiles = strip.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
            values = blocks if index is None else blocks[index]
            tiles[rows, cols] = values[:, :height, :width].to(matrix.dtype)
