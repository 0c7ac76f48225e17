"""The second mask of a weight in the state of a training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_transpose import nm_transpose
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.pattern import check_codes, codes_of, keep_again

SECOND = "second"
"""The name of the second mask in a state."""


def read_second(saved: Mapping[str, Tensor], layout: NMLayout) -> dict[str, Tensor]:
    """Return the state `saved` of one weight, its second mask as codes that fit `layout`.

    A state without codes has the rows of the second mask as numbers `[in, out // m * n]`, and slots, which follow from
    rows and the first mask.

    Raises:
        MaskError: the second mask is that of another weight or pattern.
    """
    found = {key: value for key, value in saved.items() if key not in ("rows", "slots")}
    try:
        if (rows := saved.get("rows")) is not None:
            found[SECOND] = codes_of(rows, layout.n, layout.m) if rows.shape[1] else rows.new_empty((rows.shape[0], 0))
        second = found.get(SECOND)
        if second is not None and second.shape[1]:
            check_codes(second, layout.in_features, layout.out_features, layout.n, layout.m)
            _check_inside(second, layout)
    except MaskError as error:
        raise MaskError(f"{layout.name}: {error} Give the state that was saved with these masks.") from error
    return found


def _check_inside(second: Tensor, layout: NMLayout) -> None:
    """Raise MaskError if another second mask keeps more places of the first one: then it belongs to another one."""
    codes, (n, m) = layout.codes.cpu(), (layout.n, layout.m)
    ones = torch.ones((layout.out_features, layout.per_row), dtype=torch.int16, device="cpu")
    most = keep_again(ones, codes, n, m)
    kept, wanted = (int(nm_transpose(ones, codes, each, n, m).sum()) for each in (second.cpu(), most))
    if kept != wanted:
        raise MaskError("the second mask is of a weight that was pruned in other places.")
