"""`sylva::grouped_sddmm`: the sampled product of the stacked weights of experts, each with tokens of its own.

    out[k] = (lhs[i:j]ᵀ · rhs[i:j])[r·b : (r+1)·b, c·b : (c+1)·b]

with c = positions[1, k]. The block row positions[0, k] = e·⌈m/b⌉ + r names the expert e and its own block row r, as the
matrix `[E·m, n]` does where b divides m. The tokens of e are i = offsets[e-1] to j = offsets[e], or 0 to offsets[0].
Tokens from offsets[E-1] on belong to no expert. An expert without tokens gets zeros.

Offsets are on the device of the operands, and no kernel waits for them: the launch depends on shapes alone. This module
imports torch alone; the first call on a device loads its kernel.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, read_blocks
from sylva_compile.kernels.gate import is_closed, nothing
from sylva_compile.kernels.lazy import on_first_call


def grouped_sddmm_reference(lhs: Tensor, rhs: Tensor, positions: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return the blocks of the dense product of each expert, as an oracle. Shapes as in `grouped_sddmm`."""
    wide = block_dtype(lhs.dtype)
    ends = [min(end, lhs.shape[0]) for end in offsets.tolist()]
    tokens = list(zip([0, *ends[:-1]], ends, strict=True))
    dense = torch.stack([lhs[start:end].to(wide).t() @ rhs[start:end].to(wide) for start, end in tokens])
    padded = F.pad(dense, (0, 0, 0, -dense.shape[1] % block_size))
    return read_blocks(padded, positions, block_size).contiguous()


def _gated(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        lhs: Tensor, rhs: Tensor, positions: Tensor, offsets: Tensor, block_size: int, gate: Tensor | None = None
    ) -> Tensor:
        if is_closed(gate):
            return nothing(rhs, positions, block_size)
        return kernel(lhs, rhs, positions, offsets, block_size)

    return call


@torch.library.custom_op("sylva::grouped_sddmm", mutates_args=())
def grouped_sddmm(
    lhs: Tensor, rhs: Tensor, positions: Tensor, offsets: Tensor, block_size: int, gate: Tensor | None = None
) -> Tensor:
    """Return blocks of `lhsᵀ · rhs` of every expert over its own tokens.

    Args:
        lhs: `[S, m]`, any strides, sorted by expert.
        rhs: `[S, n]`, any strides, same dtype as `lhs`.
        positions: `int64[2, nnz]`, block rows (of E experts with ⌈m/b⌉ each) and block columns (of n).
        offsets: `int32[E]` or `int64[E]`, not descending: where the tokens of each expert end.
        block_size: b.
        gate: bool `[]` on the CPU; where it is false, nothing is computed and the result is zero.

    Returns:
        `[nnz, b, b]`, contiguous, float32 (float64 for float64 operands).
    """
    return _gated(grouped_sddmm_reference)(lhs, rhs, positions, offsets, block_size, gate)


@grouped_sddmm.register_fake
def _(
    lhs: Tensor, rhs: Tensor, positions: Tensor, offsets: Tensor, block_size: int, gate: Tensor | None = None
) -> Tensor:
    return lhs.new_empty((positions.shape[1], block_size, block_size), dtype=block_dtype(lhs.dtype))


grouped_sddmm.register_kernel("cpu")(_gated(on_first_call("sylva_compile.kernels.sddmm.cpu", "grouped_sddmm_cpu")))
grouped_sddmm.register_kernel("cuda")(
    _gated(on_first_call("sylva_compile.kernels.sddmm.triton_grouped", "grouped_sddmm_triton"))
)
