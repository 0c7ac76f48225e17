"""`sylva::sddmm_shared`: the sampled products of several weights that read one activation, in one call.

    out[w] = sddmm(lhs[w], rhs, positions[w])

The shapes are those of `sylva_compile.kernels.sddmm.op`, with one result tensor for each weight. This module imports
torch alone; the first call on a device loads the C++ or the Triton kernel.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.gate import gated_shared
from sylva_compile.kernels.lazy import on_first_call
from sylva_compile.kernels.sddmm.op import sddmm_reference


@torch.library.custom_op("sylva::sddmm_shared", mutates_args=())
def sddmm_shared(
    lhs: list[Tensor], rhs: Tensor, positions: list[Tensor], block_size: int, gate: Tensor | None = None
) -> list[Tensor]:
    """Return blocks of `lhs[w]ᵀ · rhs` for each w.

    Args:
        lhs: `[T, m_w]` each, any strides.
        rhs: `[T, n]`, any strides, same dtype as each of `lhs`.
        positions: `int64[2, nnz_w]` each, block rows (of m_w) and block columns (of n).
        block_size: b.
        gate: bool `[]` on the CPU; where it is false, nothing is computed and the results are zero.

    Returns:
        `[nnz_w, b, b]` each, contiguous, float32 (float64 for float64 operands).
    """
    return gated_shared(_reference)(lhs, rhs, positions, block_size, gate)


def _reference(lhs: list[Tensor], rhs: Tensor, positions: list[Tensor], block_size: int) -> list[Tensor]:
    return [sddmm_reference(left, rhs, at, block_size) for left, at in zip(lhs, positions, strict=True)]


@sddmm_shared.register_fake
def _(
    lhs: list[Tensor], rhs: Tensor, positions: list[Tensor], block_size: int, gate: Tensor | None = None
) -> list[Tensor]:
    wide = block_dtype(rhs.dtype)
    return [rhs.new_empty((at.shape[1], block_size, block_size), dtype=wide) for at in positions]


sddmm_shared.register_kernel("cpu")(gated_shared(on_first_call("sylva_compile.kernels.sddmm.cpu", "sddmm_shared_cpu")))
sddmm_shared.register_kernel("cuda")(
    gated_shared(on_first_call("sylva_compile.kernels.sddmm.triton_kernel", "sddmm_shared_triton"))
)
