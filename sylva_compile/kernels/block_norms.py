"""`sylva::block_norms`: marks where the blocks of a dense weight gradient are scored, all of them.

Run without the compiler, it reads the dense gradient: exact. The compiler replaces it, where `sketch` is true, by a
bound that needs two small matrices and no dense gradient (`passes/sketch_block_norms.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.kernels.blocks import grid_shape, matrix_shape


@torch.library.custom_op("sylva::block_norms", mutates_args=())
def block_norms(gradient: Tensor, block_size: int, sketch: bool) -> Tensor:
    """Return the sum of squares of every block of a dense weight gradient.

    Args:
        gradient: `[m, n]`, or `[E, m, n]` of experts, the gradient of the weight as stored.
        block_size: b.
        sketch: whether the compiler may put `Σₜ ‖gyₜ[r]‖² ‖xₜ[c]‖²` in place of a block's sum, where `gradient` is
            `gyᵀ x`: the squared norm as it were if the gradients of different tokens were orthogonal.

    Returns:
        float32 `[ceil(m/b), ceil(n/b)]`.
    """
    m, n = matrix_shape(gradient.shape)
    rows, cols = grid_shape((m, n), block_size)
    sums = F.pad(gradient.reshape(m, n), (0, cols * block_size - n)).float().square().view(m, cols, block_size).sum(2)
    return F.pad(sums, (0, 0, 0, rows * block_size - m)).view(rows, block_size, cols).sum(1)


@block_norms.register_fake
def _(gradient: Tensor, block_size: int, sketch: bool) -> Tensor:
    return gradient.new_empty(grid_shape(matrix_shape(gradient.shape), block_size), dtype=torch.float32)


@torch.library.custom_op("sylva::pool_squares", mutates_args=())
def pool_squares(matrix: Tensor, block_size: int) -> Tensor:
    """Return the sums of squares of b neighbours in each row of `matrix [T, n]`: float32 `[T, ceil(n/b)]`."""
    tokens, n = matrix.shape
    groups = -(-n // block_size)
    padded = F.pad(matrix, (0, groups * block_size - n))
    return padded.float().square().view(tokens, groups, block_size).sum(2)


@pool_squares.register_fake
def _(matrix: Tensor, block_size: int) -> Tensor:
    return matrix.new_empty((matrix.shape[0], -(-matrix.shape[1] // block_size)), dtype=torch.float32)
