"""`sylva::gather_blocks`: marks where a dense weight gradient becomes the gradient of the weight's blocks.

Run without the compiler, it samples the blocks from the dense gradient: slow, simple and correct. The compiler looks
for this op and replaces it, together with the product that made the dense gradient, by `sylva::sddmm`. The op itself
does not read `input_channels` and `narrow_positions`; the rewrite needs them and cannot compute them inside a graph.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, read_blocks
from sylva_compile.kernels.gate import is_closed, nothing


@torch.library.custom_op("sylva::gather_blocks", mutates_args=())
def gather_blocks(
    gradient: Tensor,
    positions: Tensor,
    input_channels: Tensor,
    narrow_positions: Tensor,
    block_size: int,
    input_axis: int,
    gate: Tensor | None = None,
) -> Tensor:
    """Return the blocks of a dense weight gradient.

    Args:
        gradient: `[m, n]`, or `[E, m, n]` of experts, the gradient of the weight as stored.
        positions: `int64[2, nnz]`, block rows and block columns.
        input_channels: `int64[k]`, ascending: the indices along the weight's input axis that the blocks cover.
        narrow_positions: `int64[2, nnz]`, the positions in the weight restricted to `input_channels`.
        block_size: b.
        input_axis: the axis of the stored weight that the layer's inputs multiply: 1 for `nn.Linear`, 0 for Conv1D.
        gate: bool `[]` on the CPU; where it is false, the result is zero, and compiled code computes nothing.

    Returns:
        `[nnz, b, b]`, float32 (float64 for a float64 gradient), zero outside the matrix.
    """
    if is_closed(gate):
        return nothing(gradient, positions, block_size)
    return read_blocks(gradient, positions, block_size).to(block_dtype(gradient.dtype)).contiguous()


@gather_blocks.register_fake
def _(
    gradient: Tensor,
    positions: Tensor,
    input_channels: Tensor,
    narrow_positions: Tensor,
    block_size: int,
    input_axis: int,
    gate: Tensor | None = None,
) -> Tensor:
    return gradient.new_empty((positions.shape[1], block_size, block_size), dtype=block_dtype(gradient.dtype))
