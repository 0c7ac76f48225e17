"""The grouped SDDMM in Triton: one program computes one block over one part of its expert's tokens.

A program reads where the tokens of its expert begin and end, splits this range as evenly as all programs of the block
do, and walks over its own part. The grid is blocks times parts, whatever the offsets are, so the launch needs nothing
from the device. The parts are summed in order, so that equal offsets give equal bits. Programs of experts without
tokens write zeros.

The same source runs on the CPU under `TRITON_INTERPRET=1`, which must be set before this module is imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.devices import current
from sylva_compile.kernels.sddmm.configs import Config, choose_config, choose_splits
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm_reference
from sylva_compile.kernels.sddmm.triton_kernel import _INTERPRETED, _load_panel, _reach


@triton.jit(do_not_specialize=["tokens", "splits", "blocks", "row_blocks"])
def _grouped_kernel(
    lhs,
    rhs,
    positions,
    offsets,
    out,
    tokens,
    splits,
    blocks,
    row_blocks,
    m,
    n,
    lhs_token_stride,
    lhs_column_stride,
    rhs_token_stride,
    rhs_column_stride,
    BLOCK: tl.constexpr,
    PANEL: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    stacked_row = tl.load(positions + block)
    expert = stacked_row // row_blocks
    row = stacked_row % row_blocks
    col = tl.load(positions + blocks + block)

    lane = tl.arange(0, PANEL)
    lhs_inside = (lane < BLOCK) & (row * BLOCK + lane < m)
    rhs_inside = (lane < BLOCK) & (col * BLOCK + lane < n)
    step = tl.arange(0, TOKENS)
    wide = tl.int64 if LONG else tl.int32
    lhs_offsets = step.to(wide)[:, None] * lhs_token_stride + lane.to(wide)[None, :] * lhs_column_stride
    rhs_offsets = step.to(wide)[:, None] * rhs_token_stride + lane.to(wide)[None, :] * rhs_column_stride
    lhs += row.to(tl.int64) * BLOCK * lhs_column_stride
    rhs += col.to(tl.int64) * BLOCK * rhs_column_stride

    # The first expert has no neighbour before it, and its tokens begin at 0.
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.minimum(tl.load(offsets + expert).to(tl.int32), tokens)
    part = tl.cdiv(tl.cdiv(end - begin, TOKENS), splits) * TOKENS
    start = begin + split * part
    stop = tl.minimum(start + part, end)
    total = tl.zeros((PANEL, PANEL), dtype=tl.float32)
    for first in range(start, stop, TOKENS):
        at = tl.cast(first, tl.int64)
        left = _load_panel(lhs + at * lhs_token_stride, lhs_offsets, first + step, stop, lhs_inside, EXACT)
        right = _load_panel(rhs + at * rhs_token_stride, rhs_offsets, first + step, stop, rhs_inside, EXACT)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)

    address = (split.to(tl.int64) * blocks + block) * BLOCK * BLOCK + lane[:, None] * BLOCK + lane[None, :]
    if EXACT:
        tl.store(out + address, total)
    else:
        # Infinity times a lane of zeros gives NaN there, but elements over the edge must be zero.
        total = tl.where(lhs_inside[:, None] & rhs_inside[None, :], total, 0.0)
        tl.store(out + address, total, mask=(lane < BLOCK)[:, None] & (lane < BLOCK)[None, :])


def grouped_sddmm_triton(
    lhs: Tensor,
    rhs: Tensor,
    positions: Tensor,
    offsets: Tensor,
    block_size: int,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return blocks of every expert's `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm.grouped_op`.

    The shape and the device choose `config` and `splits` unless they are given. Products of float32 operands follow
    torch's TF32 switch.
    """
    if rhs.dtype == torch.float64:
        # Triton's dot takes no float64, which serves checks and not speed.
        return grouped_sddmm_reference(lhs, rhs, positions, offsets, block_size)
    b, (tokens, m), n, blocks = block_size, lhs.shape, rhs.shape[1], positions.shape[1]
    # The tokens that an expert has if all have equally many: the launch must not depend on how many it has.
    each = -(-tokens // max(offsets.shape[0], 1))
    config = config or choose_config(rhs.dtype, b, each)
    splits = splits or choose_splits(blocks, each, rhs.device)
    out = rhs.new_empty((splits, blocks, b, b), dtype=block_dtype(rhs.dtype))
    if blocks:
        panel = max(16, triton.next_power_of_2(b))
        with current(rhs.device):
            _grouped_kernel[(splits * blocks,)](
                lhs,
                rhs,
                positions.contiguous(),
                offsets.contiguous(),
                out,
                tokens,
                splits,
                blocks,
                -(-m // b),
                m,
                n,
                *lhs.stride(),
                *rhs.stride(),
                BLOCK=b,
                PANEL=panel,
                TOKENS=config.tokens,
                EXACT=panel == b and m % b == 0 and n % b == 0,
                LONG=max(_reach(operand, config.tokens, panel) for operand in (lhs, rhs)) >= 2**31,
                PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
                WIDEN=_INTERPRETED,
                num_warps=config.warps,
                num_stages=config.stages,
            )
    # The shapes fix the order of this sum; atomic additions would leave it open.
    return out.squeeze(0) if splits == 1 else out.sum(0)
