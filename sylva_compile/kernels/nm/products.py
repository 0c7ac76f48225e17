"""`sylva::nm_mm` on the CPU and on GPUs: check the operands, choose a kernel, run it."""

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm import cpu, cuda
from sylva_compile.kernels.nm.choice import choose_kernel
from sylva_compile.kernels.nm.last_choice import note_choice
from sylva_compile.kernels.nm_codes import are_codes
from sylva_compile.kernels.nm_mm import nm_mm_reference


def nm_mm_cpu(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ` or `x · W`; arguments as in `sylva_compile.kernels.nm_mm`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a place lies outside of its group.
    """
    in_features = _check(x, values, codes, n, m, transposed)
    choice = choose_kernel(x.shape[0], values.shape[0], in_features, n, m, x.dtype, x.device, transposed=transposed)
    note_choice(codes, transposed, choice.kernel, x.shape[0])
    if choice.kernel == "sparse":
        return cpu.sparse_product(x, values, codes, n, m)
    # Autocast, which is on while a layer's forward pass runs, would compute this product in another dtype.
    with torch.autocast("cpu", enabled=False):
        return cpu.dense_product(x, values, codes, n, m, transposed)


def nm_mm_cuda(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ` or `x · W`; arguments as in `sylva_compile.kernels.nm_mm`.

    Raises:
        ArgumentError: the operands do not fit each other.
    """
    with torch.autocast("cuda", enabled=False):
        if codes.shape[1] == 0 < values.shape[1]:
            if transposed:
                raise ArgumentError("x · W has no kernel for a compressed W; give its values and codes.")
            if x.dim() != 2 or x.dtype != values.dtype:
                raise ArgumentError(f"x {tuple(x.shape)} is of {x.dtype}; give x [tokens, columns] of {values.dtype}.")
            return cuda.compressed_product(x, values)
        in_features = _check(x, values, codes, n, m, transposed)
        choice = choose_kernel(x.shape[0], values.shape[0], in_features, n, m, x.dtype, x.device, transposed=transposed)
        note_choice(codes, transposed, choice.kernel, x.shape[0])
        if choice.kernel == "cusparselt":
            return cuda.packed_and_multiplied(x, values, codes, n, m)
        return nm_mm_reference(x, values, codes, n, m, transposed)


def _check(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int, transposed: bool) -> int:
    """Return the columns of W; raise ArgumentError unless the operands fit each other: the kernels read by address."""
    rows, per_row = values.shape
    fits = are_codes(codes, rows, per_row, n, m)
    in_features = per_row // n * m if fits else 0
    width = rows if transposed else in_features
    if not fits or x.dim() != 2 or x.shape[1] != width or x.dtype != values.dtype:
        raise ArgumentError(
            f"x {tuple(x.shape)} of {x.dtype}, values {tuple(values.shape)} of {values.dtype}, codes "
            f"{tuple(codes.shape)} of {codes.dtype}; give x [tokens, {width or 'columns'}] in the dtype of the values, "
            f"and uint8 codes, {n} in every {m} columns, for the values of each row."
        )
    return in_features
