"""`sylva::nm_mm` on the CPU and on GPUs: check the operands, choose a kernel, run it."""

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm import cpu, cuda
from sylva_compile.kernels.nm.choice import choose_kernel
from sylva_compile.kernels.nm.last_choice import note_choice
from sylva_compile.kernels.nm_mm import nm_mm_reference


def nm_mm_cpu(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ` or `x · W`; arguments as in `sylva_compile.kernels.nm_mm`.

    Raises:
        ArgumentError: the operands do not fit each other.
        IndexError: a column lies outside of W.
    """
    _check(x, values, columns, in_features, transposed)
    shape = (x.shape[0], values.shape[0], in_features, values.shape[1])
    choice = choose_kernel(*shape, x.dtype, x.device, transposed=transposed)
    note_choice(columns, transposed, choice.kernel, x.shape[0])
    if choice.kernel == "sparse":
        return cpu.sparse_product(x, values, columns, in_features)
    # Autocast, which is on while a layer's forward pass runs, would compute this product in another dtype.
    with torch.autocast("cpu", enabled=False):
        return cpu.dense_product(x, values, columns, in_features, transposed)


def nm_mm_cuda(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> Tensor:
    """Return `x · Wᵀ` or `x · W`; arguments as in `sylva_compile.kernels.nm_mm`.

    Raises:
        ArgumentError: the operands do not fit each other.
    """
    is_compressed = columns.shape[1] == 0 < values.shape[1]
    _check(x, values, values if is_compressed else columns, in_features, transposed)
    with torch.autocast("cuda", enabled=False):
        if is_compressed:
            if transposed:
                raise ArgumentError("x · W has no kernel for a compressed W; give its values and columns.")
            return cuda.compressed_product(x, values)
        shape = (x.shape[0], values.shape[0], in_features, values.shape[1])
        choice = choose_kernel(*shape, x.dtype, x.device, transposed=transposed)
        packs = choice.kernel == "cusparselt" and cuda.is_two_of_four(columns)
        note_choice(columns, transposed, "cusparselt" if packs else "dense", x.shape[0])
        if packs:
            return cuda.packed_and_multiplied(x, values, columns, in_features)
        return nm_mm_reference(x, values, columns, in_features, transposed)


def _check(x: Tensor, values: Tensor, columns: Tensor, in_features: int, transposed: bool) -> None:
    """Raise ArgumentError unless the operands fit each other: the kernels read by address."""
    width = values.shape[0] if transposed else in_features
    fits = x.dim() == 2 and x.shape[1] == width and x.dtype == values.dtype and values.shape == columns.shape
    if not fits:
        raise ArgumentError(
            f"x {tuple(x.shape)} of {x.dtype}, values {tuple(values.shape)} of {values.dtype}, columns "
            f"{tuple(columns.shape)}; give x [tokens, {width}] in the dtype of the values, and a column for each value."
        )
    if columns is not values and columns.dtype not in (torch.int16, torch.int32):
        raise ArgumentError(f"Columns are of {columns.dtype}; give int16 or int32.")
