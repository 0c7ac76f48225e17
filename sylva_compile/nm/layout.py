"""`NMLayout`: where the values of one pruned weight sit, in the forward pass and in the input gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.nm.pattern import keep_again


@dataclass(eq=False)
class NMLayout:
    """The places of the values of one weight. Its tensors are changed in place, so that compiled graphs stay.

    `W` is the weight as a matrix `[out, in]`, whatever way its module stores it.

    Attributes:
        name: the weight's name in the masks.
        n: how many of every m neighbours are kept.
        m: out of how many.
        out_features: the rows of W.
        in_features: the columns of W.
        input_axis: the axis of the stored weight that inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
        double: whether the input gradient uses W with the second mask; otherwise it uses W as the forward pass does.
        dtype: the dtype that the weight computes in; its values are float32 or wider.
        columns: the columns of the values, int16 or int32 `[out, in // m * n]`: the mask R.
        rows: the rows that the second mask keeps in each column, `[in, out // m * n]`: the mask C.
        slots: uint8, as `rows`: the index of each value among those of its group, `OUTSIDE` where R keeps nothing.
        frozen: whether the weight is for inference alone: its values are of `dtype`, and its second mask is dropped.
        changes: how often the second mask has been chosen again.
    """

    name: str
    n: int
    m: int
    out_features: int
    in_features: int
    input_axis: int
    double: bool
    dtype: torch.dtype
    columns: Tensor
    rows: Tensor
    slots: Tensor
    changes: int = 0
    frozen: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as its module stores it."""
        size = (self.out_features, self.in_features)
        return size if self.input_axis == 1 else size[::-1]

    @torch.no_grad()
    def change(self, values: Tensor) -> None:
        """Choose the second mask again, from `values [out, in // m * n]`, in place, unless it is dropped."""
        if not self.double or not self.rows.shape[1]:
            return
        rows, slots = keep_again(values, self.columns, self.in_features, self.n, self.m)
        self.rows.copy_(rows)
        self.slots.copy_(slots)
        self.changes += 1

    def freeze(self) -> None:
        """Let go of the second mask, of a weight that is not trained any more."""
        self.frozen = True
        self.rows, self.slots = (one.new_empty((self.in_features, 0)) for one in (self.rows, self.slots))

    def to(self, device: torch.device) -> None:
        """Move the places to `device`."""
        if device.type != "meta":
            self.columns, self.rows, self.slots = (one.to(device) for one in (self.columns, self.rows, self.slots))

    @torch.no_grad()
    def read(self, weight: Tensor) -> Tensor:
        """Return the values that `weight`, as stored, has at the kept places: `[out, in // m * n]`."""
        matrix = weight.detach() if self.input_axis == 1 else weight.detach().t()
        return matrix.gather(1, self.columns.to(weight.device).long())

    @torch.no_grad()
    def dense(self, values: Tensor) -> Tensor:
        """Return the dense weight as stored, in its dtype: zeros outside of the kept places."""
        matrix = to_dense(values.detach().to(self.dtype), self.columns.to(values.device), self.in_features)
        return matrix if self.input_axis == 1 else matrix.t().contiguous()

    @torch.no_grad()
    def check_fits(self, weight: Tensor) -> None:
        """Raise MaskError unless `weight`, as stored, has this shape, and zeros outside of the kept places."""
        if tuple(weight.shape) != self.shape:
            raise MaskError(f"{self.name} is {self.shape}, and is given values of shape {tuple(weight.shape)}.")
        if int(weight.count_nonzero()) != int(self.read(weight).count_nonzero()):
            raise MaskError(
                f"{self.name} is pruned {self.n}:{self.m}, and the values given for it are not zero outside of its "
                "mask; load them before the model is pruned, or prune it with the masks that they were trained with."
            )
