"""`WeightSpec`: everything that an estimator needs to know of a weight, without its values."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype, matrix_shape


@dataclass(frozen=True)
class WeightSpec:
    """The description of one weight.

    Attributes:
        name: its full parameter name.
        shape: as the weight is stored.
        dtype: of the weight.
        device: of the weight.
        input_axis: the axis of the stored weight that the layer's inputs meet: 1 for `nn.Linear`, 0 where it is stored
            transposed (Conv1D).
        packed: the bytes of a quantised weight; None for a dense one.
        experts: E; for more than one, `shape` is `(E·m, n)` for a weight `[E, m, n]`, and `per_expert` describes one.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    input_axis: int = 1
    packed: int | None = field(default=None, kw_only=True)
    experts: int = field(default=1, kw_only=True)

    @classmethod
    def of(cls, name: str, weight: Tensor, input_axis: int = 1) -> "WeightSpec":
        """Describe `weight`, a matrix or stacked experts `[E, m, n]`."""
        experts = int(weight.shape[0]) if weight.dim() == 3 else 1
        return cls(name, matrix_shape(weight.shape), weight.dtype, weight.device, input_axis, experts=experts)

    @property
    def outputs(self) -> int:
        """m, the layer's output channels; no property of a stack."""
        assert self.experts == 1
        return self.shape[1 - self.input_axis]

    @property
    def inputs(self) -> int:
        """n, the layer's input channels; no property of a stack."""
        assert self.experts == 1
        return self.shape[self.input_axis]

    @property
    def per_expert(self) -> "WeightSpec":
        """The description of one expert's weight; of a weight without experts, its own."""
        rows, columns = self.shape
        return dataclasses.replace(self, shape=(rows // self.experts, columns), experts=1)

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype of statistics: float32, or float64 for a float64 weight."""
        return block_dtype(self.dtype)

    def turned(self, grid: Tensor) -> Tensor:
        """Turn a grid of blocks from outputs by inputs to the stored orientation, or back; of experts, each one's."""
        if self.input_axis == 1:
            return grid
        turned: Tensor = grid.unflatten(0, (self.experts, -1)).transpose(1, 2).flatten(0, 1)
        return turned
