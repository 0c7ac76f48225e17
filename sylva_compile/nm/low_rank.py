"""`LowRank`: the state of the low-rank adapter beside one pruned weight.

    Y = X (W∘R)ᵀ + (X L Rt) / r,    L [in, r] drawn from N(0, 1),    Rt [r, out] zero at first

L is N:M along `in` from the beginning, held as values and codes like a weight, so that folding it into the sparse
product changes nothing. SLoPe itself trains a dense L and prunes it when it is folded: `prune="fold"`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_codes import columns_of
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.linear import nm_linear
from sylva_compile.nm.pattern import keep
from sylva_compile.nm.pickled import HoldsCodes

Prune = Literal["creation", "fold"]

LEFT, RIGHT = "weight_left", "weight_right"
"""The names of L and Rt, as parameters of their module and in state dicts."""


@dataclass(eq=False)
class LowRank(HoldsCodes):
    """The places of an adapter's values.

    Attributes:
        name: the weight's name.
        rank: r.
        n: how many of every m neighbours of L are kept along `in`.
        m: out of how many.
        codes: the codes of L's values `[r, in // m * n]`, uint8 `[r, ...]`; None while L is a dense `[in, r]`.
        folded: the codes of the weight's values and of L's, uint8 `[out + r, ...]`; None until L is folded.
    """

    name: str
    rank: int
    n: int
    m: int
    codes: Tensor | None
    folded: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move the places to `device`."""
        if device.type != "meta":
            self.codes = None if self.codes is None else self.codes.to(device)
            self.folded = None if self.folded is None else self.folded.to(device)

    def share_with(self, layout: NMLayout) -> None:
        """Let the codes of the weight and of L be parts of the folded ones, which are in memory once."""
        if self.folded is not None:
            layout.codes, self.codes = self.folded[: layout.out_features], self.folded[layout.out_features :]

    def output(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return `(x L Rt) / r`: `[..., out]` for `x [..., in]`."""
        middle = x @ left.to(x.dtype) if self.codes is None else nm_linear(x, left, self.codes, (self.n, self.m))
        return (middle @ right.to(x.dtype)) / self.rank

    @torch.no_grad()
    def pruned(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of a dense `left [in, r]` that are kept, `[r, in // m * n]`, and their codes."""
        codes = keep(left.detach().abs().t(), self.n, self.m)
        columns = columns_of(codes, left.shape[0] // self.m * self.n, self.n, self.m)
        return left.detach().t().gather(1, columns.long()), codes

    @torch.no_grad()
    def dense_left(self, left: Tensor, codes: Tensor | None) -> Tensor:
        """Return L as `[in, r]`, with zeros where it is pruned."""
        if codes is None:
            return left.detach()
        return to_dense(left.detach(), codes.to(left.device), self.n, self.m).t().contiguous()

    def read_left(self, left: Tensor, in_features: int) -> tuple[Tensor, Tensor | None]:
        """Return the values and the codes of a loaded `left [in, r]`.

        Raises:
            MaskError: L is of another shape, or pruned here and `left` is not, or the other way round.
        """
        if tuple(left.shape) != (in_features, self.rank):
            raise MaskError(
                f"{self.name}: the adapter to load is {tuple(left.shape)}, and this one is {(in_features, self.rank)}; "
                "add adapters of the rank that was saved."
            )
        values, codes = self.pruned(left)
        is_pruned = int(values.count_nonzero()) == int(left.count_nonzero())
        if self.codes is None:
            if is_pruned and bool(left.any()):
                raise MaskError(
                    f"{self.name}: the adapter to load is pruned {self.n}:{self.m}; add adapters with "
                    "add_low_rank(..., prune='creation') before it is loaded."
                )
            return left, None
        if not is_pruned:
            raise MaskError(
                f"{self.name}: the adapter to load is not pruned {self.n}:{self.m}; add adapters with "
                "add_low_rank(..., prune='fold') before it is loaded."
            )
        return values, codes
