"""`NMMask`: which values of one weight are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.kernels.nm_codes import columns_of
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.pattern import check_codes, check_pattern, codes_of, keep
from sylva_compile.nm.pickled import HoldsCodes


@dataclass(frozen=True, eq=False)
class NMMask(HoldsCodes):
    """An N:M mask along the inputs of one weight.

    Attributes:
        shape: of the weight as its module stores it.
        n: how many of every m neighbours along the inputs are kept.
        m: out of how many.
        input_axis: the axis of the stored weight that inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
        codes: the inputs that each output keeps, in the format of `sylva_compile.kernels.nm_codes`: uint8
            `[out, ...]` on the CPU. `columns` has them as numbers.
    """

    shape: tuple[int, int]
    n: int
    m: int
    input_axis: int
    codes: Tensor

    def __post_init__(self) -> None:
        """Check the mask. Raises MaskError where it does not keep n of every m inputs."""
        check_pattern(self.n, self.m)
        check_codes(self.codes, *self.matrix_shape, self.n, self.m)

    @classmethod
    def from_columns(cls, shape: tuple[int, int], n: int, m: int, input_axis: int, columns: Tensor) -> "NMMask":
        """Make a mask of the numbers of the inputs that each output keeps, integers `[out, in // m * n]`, ascending.

        Raises:
            MaskError: they are not n of every m inputs in ascending order.
        """
        check_pattern(n, m)
        out, size = shape if input_axis == 1 else shape[::-1]
        if size % m or columns.shape != (out, size // m * n):
            raise MaskError(f"columns are {tuple(columns.shape)} for {n}:{m} of {out} x {size}.")
        return cls(shape, n, m, input_axis, codes_of(columns.cpu(), n, m))

    @classmethod
    def by_magnitude(cls, weight: Tensor, n: int, m: int, input_axis: int) -> "NMMask":
        """Keep the largest n of every m values along the inputs of `weight`; ties go to the lower index."""
        matrix = weight.detach() if input_axis == 1 else weight.detach().t()
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        return cls(shape, n, m, input_axis, keep(matrix.abs(), n, m).cpu())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs of the weight."""
        return self.shape if self.input_axis == 1 else (self.shape[1], self.shape[0])

    @property
    def nnz(self) -> int:
        """The number of values that are kept."""
        out, size = self.matrix_shape
        return out * (size // self.m * self.n)

    @property
    def columns(self) -> Tensor:
        """The inputs that each output keeps, int16 or int32 `[out, in // m * n]` on the CPU, ascending."""
        return columns_of(self.codes, self.matrix_shape[1] // self.m * self.n, self.n, self.m)

    def dense(self) -> Tensor:
        """Return the mask as bool, in the shape of the stored weight."""
        mask = torch.zeros(self.matrix_shape, dtype=torch.bool, device="cpu").scatter_(1, self.columns.long(), True)
        return mask if self.input_axis == 1 else mask.t().contiguous()

    def same_as(self, other: "NMMask | NMLayout") -> bool:
        """Whether both keep the same values of weights of one shape."""
        mine, theirs = (self.shape, self.n, self.m, self.input_axis), (other.shape, other.n, other.m, other.input_axis)
        return mine == theirs and torch.equal(self.codes, other.codes.cpu())
