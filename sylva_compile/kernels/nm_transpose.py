"""`sylva::nm_transpose`: the values of a transposed N:M sparse matrix that is pruned once more.

W `[rows, in_features]` keeps n of every m neighbours in a row. A second mask keeps n of every m places in each column,
and makes W transposed N:M sparse too: `sylva::nm_mm` multiplies by it to get the gradient of a layer's input. Its
values are read anew from those of W wherever they are needed, so they can never be behind.

This module imports torch alone.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.lazy import on_first_call
from sylva_compile.kernels.nm_codes import columns_of
from sylva_compile.kernels.nm_mm import to_dense


def nm_transpose_reference(
    values: Tensor, codes: Tensor, second: Tensor, n: int, m: int, after: Tensor | None = None
) -> Tensor:
    """Return the values by way of the dense matrix, as an oracle. Arguments as those of `nm_transpose`."""
    places = columns_of(second, values.shape[0] // m * n, n, m)
    return to_dense(values, codes, n, m).t().gather(1, places.long())


@torch.library.custom_op("sylva::nm_transpose", mutates_args=())
def nm_transpose(values: Tensor, codes: Tensor, second: Tensor, n: int, m: int, after: Tensor | None = None) -> Tensor:
    """Return the values of the transposed matrix.

    Args:
        values: `[rows, in_features / m * n]`, the kept values of W.
        codes: their codes (`sylva_compile.kernels.nm_codes`), uint8.
        second: the codes of the rows that the second mask keeps in each column of W, uint8
            `[in_features, bytes_of(p, m)]`, p = rows / m * n.
        n: how many values of a group both masks keep.
        m: out of how many.
        after: any tensor. It is not read: compiled code gathers the values when it is there. With an output's gradient
            that is in the backward pass, where they would otherwise be gathered before and kept until then.

    Returns:
        `[in_features, p]`, contiguous, in the dtype of `values`; zero where the first mask keeps nothing.
    """
    return nm_transpose_reference(values, codes, second, n, m)


@nm_transpose.register_fake
def _(values: Tensor, codes: Tensor, second: Tensor, n: int, m: int, after: Tensor | None = None) -> Tensor:
    return values.new_empty((second.shape[0], values.shape[0] // m * n))


nm_transpose.register_kernel("cpu")(on_first_call("sylva_compile.kernels.nm.places", "nm_transpose_cpu"))
