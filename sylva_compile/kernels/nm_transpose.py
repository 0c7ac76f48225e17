"""`sylva::nm_transpose`: the values of a transposed N:M sparse matrix that is pruned once more.

W `[rows, in_features]` keeps n of every m neighbours in a row. A second mask keeps places of each column of W, and
makes W transposed N:M sparse too: `sylva::nm_mm` multiplies by it to get the gradient of a layer's input. Its values
are read anew from those of W wherever they are needed, so they can never be behind. This module imports torch alone.
"""

import torch
from torch import Tensor

from sylva_compile.kernels.lazy import on_first_call

OUTSIDE = 255
"""The slot of a place that the first mask does not keep: its value is zero."""


def nm_transpose_reference(
    values: Tensor, places: Tensor, slots: Tensor, n: int, m: int, after: Tensor | None = None
) -> Tensor:
    """Return the values by torch's own operations, as an oracle. Arguments as those of `nm_transpose`."""
    group = torch.arange(places.shape[0], device=places.device)[:, None] // m
    is_inside = slots != OUTSIDE
    index = places.long() * values.shape[1] + group * n + torch.where(is_inside, slots, 0).long()
    return torch.where(is_inside, values.flatten()[index], 0)


@torch.library.custom_op("sylva::nm_transpose", mutates_args=())
def nm_transpose(values: Tensor, places: Tensor, slots: Tensor, n: int, m: int, after: Tensor | None = None) -> Tensor:
    """Return the values of the transposed matrix.

    Args:
        values: `[rows, in_features / m * n]`, the kept values of W.
        places: int16 or int32 `[in_features, p]`, the rows that the second mask keeps in each column of W.
        slots: uint8, as `places`: the index of each value among the n of its group in W's row, or `OUTSIDE`.
        n: how many values of a group W keeps.
        m: out of how many.
        after: any tensor. It is not read: compiled code gathers the values when it is there. With an output's gradient
            that is in the backward pass, where they would otherwise be gathered before and kept until then.

    Returns:
        `[in_features, p]`, contiguous, in the dtype of `values`.
    """
    return nm_transpose_reference(values, places, slots, n, m)


@nm_transpose.register_fake
def _(values: Tensor, places: Tensor, slots: Tensor, n: int, m: int, after: Tensor | None = None) -> Tensor:
    return values.new_empty(places.shape)


nm_transpose.register_kernel("cpu")(on_first_call("sylva_compile.kernels.nm.places", "nm_transpose_cpu"))
