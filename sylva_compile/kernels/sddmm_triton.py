"""SDDMM in Triton: one program computes one block.

A program walks over the tokens, loads a `[TOKENS, b]` panel of each operand and adds their product to a float32
accumulator. Neighbouring programs share a block row, so the panel of `lhs` is found in cache.

The same source runs on the CPU under `TRITON_INTERPRET=1`, which must be set before this module is imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, read_blocks


@triton.jit
def _load_panel(base, token, token_stride, column, column_stride, tokens, columns):
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    address = base + token.to(tl.int64)[:, None] * token_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def _sddmm_kernel(
    lhs,
    rhs,
    positions,
    out,
    tokens,
    m,
    n,
    nnz,
    lhs_token_stride,
    lhs_column_stride,
    rhs_token_stride,
    rhs_column_stride,
    BLOCK: tl.constexpr,
    PANEL: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row = tl.load(positions + block)
    col = tl.load(positions + nnz + block)
    lane = tl.arange(0, PANEL)
    lhs_column = row * BLOCK + lane
    rhs_column = col * BLOCK + lane
    # A block size that is no power of two is computed in a wider tile whose surplus lanes must not read the next block.
    lhs_end = tl.minimum(m, (row + 1) * BLOCK)
    rhs_end = tl.minimum(n, (col + 1) * BLOCK)
    total = tl.zeros((PANEL, PANEL), dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        left = _load_panel(lhs, token, lhs_token_stride, lhs_column, lhs_column_stride, tokens, lhs_end)
        right = _load_panel(rhs, token, rhs_token_stride, rhs_column, rhs_column_stride, tokens, rhs_end)
        total += tl.dot(tl.trans(left), right, input_precision=PRECISION)
    inside = (lane < BLOCK)[:, None] & (lane < BLOCK)[None, :]
    address = out + block * BLOCK * BLOCK + lane[:, None] * BLOCK + lane[None, :]
    tl.store(address, total, mask=inside)


def sddmm_triton(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Blocks of `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm`. Float32 follows torch's TF32 switch."""
    nnz = positions.shape[1]
    out = torch.empty((nnz, block_size, block_size), dtype=block_dtype(lhs.dtype), device=lhs.device)
    if nnz == 0:
        return out
    if lhs.dtype == torch.float64:
        # Tensor cores and Triton's dot stop at float32; float64 is for checking, not for speed.
        return read_blocks(lhs.t() @ rhs, positions, block_size).contiguous()
    panel = max(16, triton.next_power_of_2(block_size))
    positions = positions.contiguous()
    _sddmm_kernel[(nnz,)](
        lhs,
        rhs,
        positions,
        out,
        lhs.shape[0],
        lhs.shape[1],
        rhs.shape[1],
        nnz,
        *lhs.stride(),
        *rhs.stride(),
        BLOCK=block_size,
        PANEL=panel,
        TOKENS=32 if panel >= 128 else 64,
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        num_warps=8 if panel >= 128 else 4,
    )
    return out
