"""`LowRank`: the state of the low-rank adapter beside one pruned weight.

    Y = X (W∘R)ᵀ + (X L Rt) / r,    L [in, r] drawn from N(0, 1),    Rt [r, out] zero at first

L is N:M along `in` from the beginning, held as values and columns like a weight, so that folding it into the sparse
product changes nothing. SLoPe itself trains a dense L and prunes it when it is folded: `prune="fold"`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.linear import nm_linear
from sylva_compile.nm.pattern import keep

Prune = Literal["creation", "fold"]

LEFT, RIGHT = "weight_left", "weight_right"
"""The names of L and Rt, as parameters of their module and in state dicts."""


@dataclass(eq=False)
class LowRank:
    """The places of an adapter's values.

    Attributes:
        name: the weight's name.
        rank: r.
        n: how many of every m neighbours of L are kept along `in`.
        m: out of how many.
        prune: when L is pruned.
        columns: the columns of L's values `[r, in // m * n]`; None while L is a dense `[in, r]`.
        folded: the columns of the weight's values and of L's, `[out + r, in // m * n]`; None until L is folded.
    """

    name: str
    rank: int
    n: int
    m: int
    prune: Prune
    columns: Tensor | None
    folded: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move the places to `device`."""
        if device.type != "meta":
            self.columns = None if self.columns is None else self.columns.to(device)
            self.folded = None if self.folded is None else self.folded.to(device)

    def share_with(self, layout: NMLayout) -> None:
        """Let the columns of the weight and of L be parts of the folded ones, which are in memory once."""
        if self.folded is not None:
            layout.columns, self.columns = self.folded[: layout.out_features], self.folded[layout.out_features :]

    def output(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return `(x L Rt) / r`: `[..., out]` for `x [..., in]`."""
        middle = x @ left.to(x.dtype) if self.columns is None else nm_linear(x, left, self.columns)
        return (middle @ right.to(x.dtype)) / self.rank

    @torch.no_grad()
    def pruned(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of a dense `left [in, r]` that are kept, `[r, in // m * n]`, and their columns."""
        columns = keep(left.detach().abs().t(), self.n, self.m)
        return left.detach().t().gather(1, columns.long()), columns

    @torch.no_grad()
    def dense_left(self, left: Tensor, columns: Tensor | None) -> Tensor:
        """Return L as `[in, r]`, with zeros where it is pruned."""
        if columns is None:
            return left.detach()
        size = left.shape[1] // self.n * self.m
        return to_dense(left.detach(), columns.to(left.device), size).t().contiguous()

    def read_left(self, left: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the values and the columns of a loaded `left [in, r]`.

        Raises:
            MaskError: L is pruned here, and `left` is not.
        """
        if self.columns is None:
            return left, None
        values, columns = self.pruned(left)
        if int(values.count_nonzero()) != int(left.count_nonzero()):
            raise MaskError(
                f"{self.name}: the adapter to load is not pruned {self.n}:{self.m}; add adapters with "
                "add_low_rank(..., prune='fold') before it is loaded."
            )
        return values, columns
