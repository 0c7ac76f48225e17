"""SDDMM on the CPU: `sddmm.cpp`, compiled for this processor on the first call and called through its C interface.

Without a C++ compiler, one small GEMM computes each run of neighbouring blocks: correct, but slower for small blocks.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.build.native import load
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm_reference

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_TASKS = 64
_SEGMENT = 256


def sddmm_cpu(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return blocks of `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm.op`.

    The result is the same, bit for bit, for any number of threads. Processors with AVX-512's instructions for bfloat16
    multiply bfloat16 by them, and take subnormal numbers (below 1.2e-38) for zero.

    Raises:
        IndexError: a position lies outside of the matrix.
        MemoryError: there is no memory for the packed panels.
        ValueError: the operands differ in dtype or in tokens, or positions are not int64.
    """
    _check(lhs, rhs, positions)
    if _kernel() is None:
        return sddmm_by_products(lhs, rhs, positions, block_size)
    return _compute(lhs, rhs, positions, block_size, segments_of(lhs.shape[0], max(positions.shape[1], 1)), None)


def grouped_sddmm_cpu(lhs: Tensor, rhs: Tensor, positions: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Return blocks of every expert's `lhsᵀ · rhs`; shapes as in `sylva_compile.kernels.sddmm.grouped_op`.

    Each block is summed by one thread, so that the result is the same, bit for bit, for any number of threads.

    Raises:
        IndexError, MemoryError, ValueError: as `sddmm_cpu` does.
    """
    _check(lhs, rhs, positions)
    if _kernel() is None:
        return grouped_sddmm_reference(lhs, rhs, positions, offsets, block_size)
    return _compute(lhs, rhs, positions, block_size, 1, offsets.to(torch.int32).contiguous())


def _compute(
    lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int, segments: int, offsets: Tensor | None
) -> Tensor:
    """Call the compiled kernel, which is there; without `offsets`, there are no experts."""
    kernel = _kernel()
    assert kernel is not None
    tokens, nnz = lhs.shape[0], positions.shape[1]
    experts = 1 if offsets is None else len(offsets)
    wide = block_dtype(lhs.dtype)
    if tokens == 0 or nnz == 0:
        return torch.zeros((nnz, block_size, block_size), dtype=wide, device="cpu")
    out = torch.empty((segments, nnz, block_size, block_size), dtype=wide, device="cpu")
    positions = positions.contiguous()
    failed = kernel(
        _DTYPES[lhs.dtype],
        lhs.data_ptr(),
        lhs.shape[1],
        *lhs.stride(),
        rhs.data_ptr(),
        rhs.shape[1],
        *rhs.stride(),
        tokens,
        positions.data_ptr(),
        nnz,
        block_size,
        segments,
        torch.get_num_threads(),
        None if offsets is None else offsets.data_ptr(),
        experts,
        out.data_ptr(),
    )
    if failed == 1:
        raise IndexError(
            f"A position lies outside of the [{lhs.shape[1]}, {rhs.shape[1]}] matrix with blocks of b={block_size}"
            + (f" of {experts} experts." if experts > 1 else ".")
        )
    if failed:
        raise MemoryError("No memory for the panels of sylva::sddmm.")
    # A view of the buffer would keep the other segments alive.
    return out[0] if segments == 1 else out[0].clone()


def _check(lhs: Tensor, rhs: Tensor, positions: Tensor) -> None:
    if lhs.dtype != rhs.dtype or lhs.shape[0] != rhs.shape[0] or positions.dtype != torch.int64:
        # The kernel reads by address and would read past the end of the shorter operand.
        raise ValueError(
            f"lhs {tuple(lhs.shape)} of {lhs.dtype}, rhs {tuple(rhs.shape)} of {rhs.dtype}, positions of "
            f"{positions.dtype}; give operands of one dtype with equally many rows, and positions of int64."
        )


def sddmm_shared_cpu(lhs: list[Tensor], rhs: Tensor, positions: list[Tensor], block_size: int) -> list[Tensor]:
    """Return blocks of `lhs[w]ᵀ · rhs` for each w; shapes as in `sylva_compile.kernels.sddmm.shared_op`."""
    return [sddmm_cpu(left, rhs, at, block_size) for left, at in zip(lhs, positions, strict=True)]


def segments_of(tokens: int, nnz: int) -> int:
    """Return the number of parts of the sum over `tokens`: enough for all threads where blocks are few."""
    # It depends on the shape alone: if it depended on the number of threads, results would differ between machines.
    return max(1, min(-(-_TASKS // nnz), tokens // _SEGMENT))


def sddmm_by_products(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return blocks of `lhsᵀ · rhs` by torch's GEMMs, for machines without a C++ compiler.

    It makes neither the dense `m x n` product nor a copy of an operand. It widens operands narrower than float32 a
    panel at a time, so that sums are in float32 and the widened panel stays in cache.
    """
    m, n = lhs.shape[1], rhs.shape[1]
    wide = block_dtype(lhs.dtype)
    out = torch.zeros((positions.shape[1], block_size, block_size), dtype=wide, device="cpu")
    rows, cols = positions.tolist()
    panel_of, panel = -1, lhs
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and rows[stop] == rows[start] and cols[stop] == cols[stop - 1] + 1:
            stop += 1
        row, col = rows[start] * block_size, cols[start] * block_size
        if panel_of != row:
            panel_of, panel = row, lhs[:, row : row + block_size].to(wide).t()
        width = min(col + (stop - start) * block_size, n) - col
        height = min(block_size, m - row)
        product = panel @ rhs[:, col : col + width].to(wide)
        for k in range(start, stop):
            at = (k - start) * block_size
            piece = product[:, at : at + block_size]
            out[k, :height, : piece.shape[1]] = piece
        start = stop
    return out


@functools.cache
def _kernel() -> Callable[..., int] | None:
    """Return the compiled kernel; log a warning and return None where it cannot be compiled."""
    try:
        library = load(Path(__file__).with_name("sddmm.cpp").read_text(), name="the SDDMM kernel")
    except NativeCompilerError as error:
        log.warning("SDDMM runs without its compiled kernel: correct, but slower. %s", error)
        return None
    function: Callable[..., int] = library.sylva_sddmm
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    operand = [pointer, size, size, size]
    function.argtypes = [  # type: ignore[attr-defined]
        ctypes.c_int,
        *operand,
        *operand,
        *(size, pointer, size, size, size),
        *(ctypes.c_int, pointer, size, pointer),
    ]
    function.restype = ctypes.c_int  # type: ignore[attr-defined]
    return function
