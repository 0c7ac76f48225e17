"""`NMMask`: which values of one weight are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.nm.pattern import check_pattern, keep


@dataclass(frozen=True, eq=False)
class NMMask:
    """An N:M mask along the inputs of one weight.

    Attributes:
        shape: of the weight as its module stores it.
        n: how many of every m neighbours along the inputs are kept.
        m: out of how many.
        input_axis: the axis of the stored weight that inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
        columns: the inputs that each output keeps, int16 or int32 `[out, in // m * n]` on the CPU, ascending.
    """

    shape: tuple[int, int]
    n: int
    m: int
    input_axis: int
    columns: Tensor

    def __post_init__(self) -> None:
        """Check the mask. Raises MaskError where it does not keep n of every m inputs."""
        check_pattern(self.n, self.m)
        out, size = self.matrix_shape
        if size % self.m or self.columns.shape != (out, size // self.m * self.n):
            raise MaskError(f"columns are {tuple(self.columns.shape)} for {self.n}:{self.m} of {out} x {size}.")
        groups = self.columns.long().unflatten(1, (size // self.m, self.n))
        first = torch.arange(0, size, self.m, device="cpu")[:, None]
        inside = (groups >= first) & (groups < first + self.m)
        if not bool(inside.all()) or not bool((groups.diff(dim=2) > 0).all()):
            raise MaskError(f"columns do not keep {self.n} of every {self.m} inputs in ascending order.")

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
        return self.columns.numel()

    def dense(self) -> Tensor:
        """Return the mask as bool, in the shape of the stored weight."""
        mask = torch.zeros(self.matrix_shape, dtype=torch.bool, device="cpu").scatter_(1, self.columns.long(), True)
        return mask if self.input_axis == 1 else mask.t().contiguous()

    def same_as(self, other: "NMMask") -> bool:
        """Whether both keep the same values of weights of one shape."""
        mine, theirs = (self.shape, self.n, self.m, self.input_axis), (other.shape, other.n, other.m, other.input_axis)
        return mine == theirs and torch.equal(self.columns, other.columns)
