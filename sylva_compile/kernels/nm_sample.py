"""`sylva::nm_sample`: the gradient of an N:M sparse weight, a dense product sampled at the kept places.

    out[i, k] = (lhsᵀ · rhs)[i, column of value k]

Half of a product's elements at scattered places cost more than all of them, so the product stays dense. The kernel of
the CPU takes it some rows at a time and never holds all of it. This module imports torch alone.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.lazy import on_first_call
from sylva_compile.kernels.nm_codes import columns_of


def nm_sample_reference(lhs: Tensor, rhs: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return the elements by way of the whole product, as an oracle. Arguments as those of `nm_sample`."""
    columns = columns_of(codes, rhs.shape[1] // m * n, n, m)
    return (lhs.t() @ rhs).gather(1, columns.long())


@torch.library.custom_op("sylva::nm_sample", mutates_args=())
def nm_sample(lhs: Tensor, rhs: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return elements of `lhsᵀ · rhs`.

    Args:
        lhs: `[T, rows]`, the gradient of the layer's output; any strides.
        rhs: `[T, in_features]`, the layer's input, in the dtype of `lhs`; any strides.
        codes: the places that the weight keeps, uint8 `[rows, bytes_of(p, m)]` (`sylva_compile.kernels.nm_codes`).
        n: how many places of a group are kept.
        m: out of how many.

    Returns:
        `[rows, p]`, p = in_features / m * n; contiguous, in the dtype of the operands.
    """
    return nm_sample_reference(lhs, rhs, codes, n, m)


@nm_sample.register_fake
def _(lhs: Tensor, rhs: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    return lhs.new_empty((lhs.shape[1], rhs.shape[1] // m * n))


nm_sample.register_kernel("cpu")(on_first_call("sylva_compile.kernels.nm.places", "nm_sample_cpu"))
