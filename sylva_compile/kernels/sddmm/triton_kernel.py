"""SDDMM in Triton: one program computes one block over one segment of the tokens.

A program walks over its tokens, loads a `[TOKENS, b]` panel of each operand and adds their product to a float32
accumulator. Where the blocks alone do not fill the device, the launch splits the tokens over programs (split-K), each
of which writes a partial result; the parts are then summed in order, so that every run returns the same bits.

Programs are numbered by segment, then by block in the order of the positions (by block row). Programs that run at one
time therefore read the same tokens, and neighbours read the same panel of `lhs` from the cache. One launch serves up to
`WEIGHTS` weights that share `rhs`.

The same source runs on the CPU under `TRITON_INTERPRET=1`, which must be set before this module is imported.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, read_blocks
from sylva_compile.kernels.devices import current
from sylva_compile.kernels.sddmm.configs import Config, choose_config, choose_splits

WEIGHTS = 3
"""The largest number of weights in one launch: query, key and value, or gate and up."""

# The interpreter stores bfloat16 as 16-bit integers, and its dot would multiply those integers.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _pick(which, first, second, third, WEIGHTS: tl.constexpr):
    """Return the argument that belongs to weight `which`."""
    if WEIGHTS == 1:
        return first
    elif WEIGHTS == 2:
        return tl.where(which == 0, first, second)
    else:
        return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit
def _load_panel(base, offsets, token, tokens, inside, EXACT: tl.constexpr):
    """Load a `[TOKENS, PANEL]` tile; elements past the last token, or not `inside`, are zero."""
    if EXACT:
        return tl.load(base + offsets, mask=(token < tokens)[:, None], other=0.0)
    else:
        return tl.load(base + offsets, mask=(token < tokens)[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens", "splits", "blocks0", "blocks1", "blocks2"])
def _sddmm_kernel(
    lhs0,
    lhs1,
    lhs2,
    rhs,
    positions0,
    positions1,
    positions2,
    out0,
    out1,
    out2,
    tokens,
    splits,
    blocks0,
    blocks1,
    blocks2,
    m0,
    m1,
    m2,
    n,
    lhs_token_stride0,
    lhs_token_stride1,
    lhs_token_stride2,
    lhs_column_stride,
    rhs_token_stride,
    rhs_column_stride,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PANEL: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    all_blocks = blocks0 + blocks1 + blocks2
    split = tl.program_id(0) // all_blocks
    place = tl.program_id(0) % all_blocks
    which = (place >= blocks0).to(tl.int32) + (place >= blocks0 + blocks1).to(tl.int32)
    blocks = _pick(which, blocks0, blocks1, blocks2, WEIGHTS)
    block = place - _pick(which, 0, blocks0, blocks0 + blocks1, WEIGHTS)
    lhs = _pick(which, lhs0, lhs1, lhs2, WEIGHTS)
    positions = _pick(which, positions0, positions1, positions2, WEIGHTS)
    out = _pick(which, out0, out1, out2, WEIGHTS)
    m = _pick(which, m0, m1, m2, WEIGHTS)
    lhs_token_stride = _pick(which, lhs_token_stride0, lhs_token_stride1, lhs_token_stride2, WEIGHTS)

    row = tl.load(positions + block)
    col = tl.load(positions + blocks + block)
    lane = tl.arange(0, PANEL)
    # Surplus lanes (for a block size that is no power of two, or at the matrix's edge) must not read the next block.
    lhs_inside = (lane < BLOCK) & (row * BLOCK + lane < m)
    rhs_inside = (lane < BLOCK) & (col * BLOCK + lane < n)

    # One 64-bit base a tile; offsets inside the tile are 32 bits wide unless a stride is enormous.
    step = tl.arange(0, TOKENS)
    wide = tl.int64 if LONG else tl.int32
    lhs_offsets = step.to(wide)[:, None] * lhs_token_stride + lane.to(wide)[None, :] * lhs_column_stride
    rhs_offsets = step.to(wide)[:, None] * rhs_token_stride + lane.to(wide)[None, :] * rhs_column_stride
    lhs += row.to(tl.int64) * BLOCK * lhs_column_stride
    rhs += col.to(tl.int64) * BLOCK * rhs_column_stride

    segment = tl.cdiv(tl.cdiv(tokens, TOKENS), splits) * TOKENS
    start = split * segment
    stop = tl.minimum(start + segment, tokens)
    total = tl.zeros((PANEL, PANEL), dtype=tl.float32)
    for first in range(start, stop, TOKENS):
        at = tl.cast(first, tl.int64)
        left = _load_panel(lhs + at * lhs_token_stride, lhs_offsets, first + step, tokens, lhs_inside, EXACT)
        right = _load_panel(rhs + at * rhs_token_stride, rhs_offsets, first + step, tokens, rhs_inside, EXACT)
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


def sddmm_triton(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return blocks of `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm.op`.

    Products of float32 operands follow torch's TF32 switch.
    """
    return sddmm_shared_triton([lhs], rhs, [positions], block_size)[0]


def sddmm_shared_triton(
    lhs: Sequence[Tensor],
    rhs: Tensor,
    positions: Sequence[Tensor],
    block_size: int,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> list[Tensor]:
    """Return blocks of `lhs[w]ᵀ · rhs` for each w; shapes as in `sylva_compile.kernels.sddmm.shared_op`.

    The shape and the device choose `config` and `splits` unless they are given.
    """
    if rhs.dtype == torch.float64:
        # Triton's dot takes no float64, which serves checks and not speed.
        pairs = zip(lhs, positions, strict=True)
        return [read_blocks(left.t() @ rhs, at, block_size).contiguous() for left, at in pairs]
    found: list[Tensor] = []
    start = 0
    while start < len(lhs):
        stop = start + 1
        # Operands of one launch share their column stride, as the gradients of one layer do.
        while stop < min(len(lhs), start + WEIGHTS) and lhs[stop].stride(1) == lhs[start].stride(1):
            stop += 1
        found += _launch(lhs[start:stop], rhs, positions[start:stop], block_size, config, splits)
        start = stop
    return found


def _launch(
    lhs: Sequence[Tensor],
    rhs: Tensor,
    positions: Sequence[Tensor],
    b: int,
    config: Config | None,
    splits: int | None,
) -> list[Tensor]:
    """Compute at most WEIGHTS weights in one launch; shapes as for `sddmm_shared_triton`."""
    tokens, counts = rhs.shape[0], [at.shape[1] for at in positions]
    config = config or choose_config(rhs.dtype, b, tokens)
    splits = splits or choose_splits(sum(counts), tokens, rhs.device)
    out = [rhs.new_empty((splits, count, b, b), dtype=block_dtype(rhs.dtype)) for count in counts]
    if sum(counts):
        panel = max(16, triton.next_power_of_2(b))
        widths = [left.shape[1] for left in lhs]
        exact = panel == b and all(width % b == 0 for width in [*widths, rhs.shape[1]])
        with current(rhs.device):
            _sddmm_kernel[(splits * sum(counts),)](
                *_padded(lhs),
                rhs,
                *_padded([at.contiguous() for at in positions]),
                *_padded(out),
                tokens,
                splits,
                *[*counts, 0, 0][:WEIGHTS],
                *_padded(widths),
                rhs.shape[1],
                *_padded([left.stride(0) for left in lhs]),
                lhs[0].stride(1),
                *rhs.stride(),
                WEIGHTS=len(lhs),
                BLOCK=b,
                PANEL=panel,
                TOKENS=config.tokens,
                EXACT=exact,
                LONG=max(_reach(operand, config.tokens, panel) for operand in (*lhs, rhs)) >= 2**31,
                PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
                WIDEN=_INTERPRETED,
                num_warps=config.warps,
                num_stages=config.stages,
            )
    # The shapes fix the order of this sum; atomic additions would leave it open.
    return [part.squeeze(0) if splits == 1 else part.sum(0) for part in out]


def _padded(values: Sequence[Any]) -> list[Any]:
    """Fill `values` up to WEIGHTS arguments; the kernel does not read the surplus ones."""
    return [*values, *[values[0]] * (WEIGHTS - len(values))]


def _reach(operand: Tensor, tokens: int, panel: int) -> int:
    """Return the largest offset inside one tile, in elements."""
    return operand.stride(0) * tokens + operand.stride(1) * panel
