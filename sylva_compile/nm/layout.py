"""`NMLayout`: where the values of one pruned weight sit, in the forward pass and in the input gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_codes import columns_of
from sylva_compile.kernels.nm_mm import to_dense
from sylva_compile.nm.pattern import keep_again
from sylva_compile.nm.pickled import HoldsCodes


@dataclass(eq=False)
class NMLayout(HoldsCodes):
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
        codes: the codes of the columns that each row keeps (`sylva_compile.kernels.nm_codes`), uint8
            `[out, bytes_of(in // m * n, m)]`: the mask R.
        second: the codes of the rows that each column keeps, uint8 `[in, bytes_of(out // m * n, m)]`: the mask C;
            `[in, 0]` where there is none.
        frozen: whether the weight is for inference alone: its values are of `dtype`, and its second mask is dropped.
    """

    name: str
    n: int
    m: int
    out_features: int
    in_features: int
    input_axis: int
    double: bool
    dtype: torch.dtype
    codes: Tensor
    second: Tensor
    frozen: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as its module stores it."""
        size = (self.out_features, self.in_features)
        return size if self.input_axis == 1 else size[::-1]

    @property
    def per_row(self) -> int:
        """The number of values in a row of W."""
        return self.in_features // self.m * self.n

    @torch.no_grad()
    def change(self, values: Tensor) -> None:
        """Choose the second mask again, from `values [out, in // m * n]`, in place, unless it is dropped."""
        if not self.double or not self.second.shape[1]:
            return
        self.second.copy_(keep_again(values, self.codes, self.n, self.m))

    def freeze(self) -> None:
        """Let go of the second mask, of a weight that is not trained any more."""
        self.frozen = True
        self.second = self.second.new_empty((self.in_features, 0))

    def to(self, device: torch.device) -> None:
        """Move the places to `device`."""
        if device.type != "meta":
            self.codes, self.second = self.codes.to(device), self.second.to(device)

    @torch.no_grad()
    def read(self, weight: Tensor) -> Tensor:
        """Return the values that `weight`, as stored, has at the kept places: `[out, in // m * n]`."""
        matrix = weight.detach() if self.input_axis == 1 else weight.detach().t()
        return matrix.gather(1, columns_of(self.codes.to(weight.device), self.per_row, self.n, self.m).long())

    @torch.no_grad()
    def dense(self, values: Tensor) -> Tensor:
        """Return the dense weight as stored, in its dtype: zeros outside of the kept places."""
        matrix = to_dense(values.detach().to(self.dtype), self.codes.to(values.device), self.n, self.m)
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
