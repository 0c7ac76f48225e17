"""The layout of blocks in a matrix: the plain gather and scatter that every kernel agrees with.

A grid of `b x b` blocks tiles a matrix `[m, n]` from its upper left corner. Positions are `int64[2, nnz]`: block rows,
then block columns. Blocks are `[nnz, b, b]` in that order. Where b does not divide m or n, the last block row or column
reaches over the edge: the part beyond the edge reads as zero and is never written.

The stacked weights `[E, m, n]` of E experts are the matrix `[E·m, n]`, in the same memory.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_shape(shape: tuple[int, int] | torch.Size, block_size: int) -> tuple[int, int]:
    """Return the number of block rows and block columns that cover a matrix of `shape`."""
    return -(-shape[0] // block_size), -(-shape[1] // block_size)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a weight seen as a matrix: `[m, n]` as it is, `[E·m, n]` for stacked experts `[E, m, n]`."""
    return math.prod(shape[:-1]), int(shape[-1])


def as_matrix(weight: Tensor) -> Tensor:
    """Return `weight [m, n]` itself, or stacked experts `[E, m, n]` as the matrix `[E·m, n]` in the same memory."""
    return weight if weight.dim() == 2 else weight.view(matrix_shape(weight.shape))


def block_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of blocks that train a weight of `dtype`: float32, or float64 for a float64 weight."""
    return torch.promote_types(dtype, torch.float32)


def read_blocks(matrix: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Copy the blocks at `positions` out of `matrix [m, n]`; return `[nnz, b, b]` in the matrix's dtype."""
    if matrix.dim() > 2:
        # A gradient of experts may be transposed, and then this copies it.
        matrix = matrix.reshape(matrix_shape(matrix.shape))
    m, n = matrix.shape
    mb, nb = grid_shape(matrix.shape, block_size)
    if m % block_size or n % block_size:
        matrix = F.pad(matrix, (0, nb * block_size - n, 0, mb * block_size - m))
    tiles: Tensor = matrix.unflatten(1, (nb, block_size)).unflatten(0, (mb, block_size)).transpose(1, 2)
    return tiles[positions[0], positions[1]]


class BlockCopier:
    """Copies blocks out of a matrix and back into it, in the matrix's dtype.

    Where blocks do not reach over an edge, a row of a block lies in one piece in memory, and whole pieces are copied:
    several times as fast as by element.
    """

    def __init__(self, matrix: Tensor, positions: Tensor, block_size: int) -> None:
        """Copy blocks of `matrix [m, n]` at `positions int64[2, nnz]`, on the matrix's device."""
        matrix = as_matrix(matrix.detach())
        self._matrix, self._positions, self._b = matrix, positions, block_size
        self._pieces: Tensor | None = None
        (m, n), b = matrix.shape, block_size
        if m % b == n % b == 0 and matrix.is_contiguous():
            lane = torch.arange(b, device=matrix.device)
            self._pieces = ((positions[0][:, None] * b + lane) * (n // b) + positions[1][:, None]).flatten()

    def read(self) -> Tensor:
        """Return the blocks, `[nnz, b, b]`."""
        if self._pieces is None:
            return read_blocks(self._matrix, self._positions, self._b)
        return self._matrix.view(-1, self._b).index_select(0, self._pieces).view(-1, self._b, self._b)

    @torch.no_grad()
    def write(self, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]`; those of a matrix with edges inside of blocks are written by element."""
        if self._pieces is None:
            BlockWriter(self._matrix.shape, self._positions, self._b).write(self._matrix, blocks)
        else:
            self._matrix.view(-1, self._b).index_copy_(0, self._pieces, blocks.to(self._matrix.dtype).view(-1, self._b))


class BlockWriter:
    """Writes blocks in place into matrices of one shape; the elements outside the blocks stay bit for bit as they are.

    Four strided views of the matrix hold the blocks inside it, over its right edge, over its lower edge and over its
    corner, so no element index is stored. The constructor sorts the blocks into these views once.
    """

    def __init__(self, shape: Sequence[int], positions: Tensor, block_size: int) -> None:
        """Sort the blocks at `positions int64[2, nnz]`, which may be on any device.

        This waits for that device if blocks may reach over an edge. The writer keeps `positions` itself and no copy:
        `write` reads the rows and columns there.
        """
        self.shape, self.block_size, self.positions = matrix_shape(shape), block_size, positions
        self._inner_rows, self._inner_cols = (size // block_size for size in self.shape)
        self._parts: list[tuple[bool, bool, Tensor | None]] = []
        if not any(size % block_size for size in self.shape):
            self._parts = [(False, False, None)] if positions.shape[1] else []
            return
        over_right = positions[1] >= self._inner_cols
        over_bottom = positions[0] >= self._inner_rows
        for below, right in ((False, False), (False, True), (True, False), (True, True)):
            chosen = (over_bottom == below) & (over_right == right)
            if bool(chosen.any()):
                index = None if bool(chosen.all()) else chosen.nonzero().squeeze(1)
                self._parts.append((below, right, index))

    @torch.no_grad()
    def write(self, matrix: Tensor, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]`, rounded to the matrix's dtype, into `matrix [m, n]` in place."""
        b, matrix = self.block_size, as_matrix(matrix)
        for below, right, index in self._parts:
            first_row, first_col = self._inner_rows if below else 0, self._inner_cols if right else 0
            rows, cols = self.positions if index is None else self.positions[:, index]
            at_row = slice(first_row * b, None) if below else slice(0, self._inner_rows * b)
            at_col = slice(first_col * b, None) if right else slice(0, self._inner_cols * b)
            rows, cols = rows - first_row if below else rows, cols - first_col if right else cols
            strip = matrix[at_row, at_col]
            height, width = min(b, strip.shape[0]), min(b, strip.shape[1])
            tiles = strip.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
            values = blocks if index is None else blocks[index]
            tiles[rows, cols] = values[:, :height, :width].to(matrix.dtype)
