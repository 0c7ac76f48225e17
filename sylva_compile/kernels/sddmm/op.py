"""`sylva::sddmm`: the sampled dense-dense product that computes the gradients of chosen blocks only.

    out[k] = (lhsᵀ · rhs)[r·b : (r+1)·b, c·b : (c+1)·b]      with r, c = positions[:, k]

Sylva, eqn 16: both operands are token-major as layers hold them, `lhs [T, m]` (output gradients for `nn.Linear`) and
`rhs [T, n]` (activations). Kernels sum over the T tokens in float32 or wider and return `[nnz, b, b]` in that dtype;
elements of a block beyond the matrix's edge are zero.

This module imports neither Triton nor a compiled library; the first call on a device loads its kernel.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, read_blocks
from sylva_compile.kernels.gate import gated
from sylva_compile.kernels.lazy import on_first_call


def sddmm_reference(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the blocks of the whole dense product, as an oracle. Shapes as in the module's docstring."""
    wide = block_dtype(lhs.dtype)
    return read_blocks(lhs.to(wide).t() @ rhs.to(wide), positions, block_size).contiguous()


@torch.library.custom_op("sylva::sddmm", mutates_args=())
def sddmm(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int, gate: Tensor | None = None) -> Tensor:
    """Return blocks of `lhsᵀ · rhs`.

    Args:
        lhs: `[T, m]`, any strides.
        rhs: `[T, n]`, any strides, same dtype as `lhs`.
        positions: `int64[2, nnz]`, block rows (of m) and block columns (of n).
        block_size: b.
        gate: bool `[]` on the CPU; where it is false, nothing is computed and the result is zero.

    Returns:
        `[nnz, b, b]`, contiguous, float32 (float64 for float64 operands).
    """
    return gated(sddmm_reference)(lhs, rhs, positions, block_size, gate)


@sddmm.register_fake
def _(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int, gate: Tensor | None = None) -> Tensor:
    return lhs.new_empty((positions.shape[1], block_size, block_size), dtype=block_dtype(lhs.dtype))


sddmm.register_kernel("cpu")(gated(on_first_call("sylva_compile.kernels.sddmm.cpu", "sddmm_cpu")))
sddmm.register_kernel("cuda")(gated(on_first_call("sylva_compile.kernels.sddmm.triton_kernel", "sddmm_triton")))
