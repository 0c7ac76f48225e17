"""`QuantisedOriginals`: the values from before training of a quantised weight, by place, read from its base."""

import torch
from torch import Tensor

from sylva_compile.kernels.blocks import grid_shape, read_blocks
from sylva_compile.quantised.format import QuantisedBase


class QuantisedOriginals:
    """Stands for `Originals` of a dense weight; the base still has all values, so that nothing is kept."""

    def __init__(self, base: QuantisedBase, places: Tensor, block_size: int) -> None:
        """Read `base` at `places int64[2, count]`, every place where blocks have been, sorted."""
        self._base, self.places, self.block_size = base, places, block_size

    @property
    def values(self) -> Tensor:
        """The values at `places`, `[count, b, b]` on the CPU, in the dtype of trained values."""
        return self.at(self.places)

    @property
    def count(self) -> int:
        """The number of places where blocks have been."""
        return self.places.shape[1]

    @property
    def most(self) -> int:
        """The number of all places of the weight."""
        rows, cols = grid_shape(self._base.shape, self.block_size)
        return rows * cols

    @property
    def is_whole(self) -> bool:
        """Whether blocks have been everywhere."""
        return self.count == self.most

    @property
    def nbytes(self) -> int:
        """The bytes that are kept: none."""
        return 0

    @torch.no_grad()
    def at(self, positions: Tensor) -> Tensor:
        """Return the values at `positions int64[2, k]`: `[k, b, b]` on the CPU."""
        dense = self._base.dense().to(self._base.value_dtype)
        return read_blocks(dense, positions.to(dense.device), self.block_size).cpu()
