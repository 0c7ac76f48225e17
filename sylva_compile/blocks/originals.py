"""`Originals`: what a weight held before training, at every place where its blocks have ever been."""

import torch
from torch import Tensor

from sylva_compile.blocks.shards import ShardCopier, copier_of, local, read_places
from sylva_compile.kernels.blocks import BlockCopier, grid_shape, matrix_shape


class Originals:
    """The values from before training, on the CPU and in the weight's dtype, by place.

    A place keeps the value that it had when a block first came there. So the store holds at most one copy of the
    weight, however often its blocks move.
    """

    def __init__(self, weight: Tensor, positions: Tensor, block_size: int) -> None:
        """Keep the blocks of `weight [m, n]` at `positions int64[2, nnz]`, on the CPU."""
        self.shape, self.block_size = matrix_shape(weight.shape), block_size
        self._slots = torch.full(grid_shape(self.shape, block_size), -1, dtype=torch.int64, device="cpu")
        """The index of each place's values among `_values`; -1 for a place where no block has been."""
        self._values = torch.empty((0, block_size, block_size), dtype=weight.dtype, device="cpu")
        self._count = 0
        self.add(weight, positions)

    @property
    def places(self) -> Tensor:
        """The places, `int64[2, count]` on the CPU, sorted by row, then column."""
        return (self._slots >= 0).nonzero().t()

    @property
    def values(self) -> Tensor:
        """The values at `places`, `[count, b, b]`."""
        return self.at(self.places)

    @property
    def count(self) -> int:
        """The number of places where blocks have been."""
        return self._count

    @property
    def most(self) -> int:
        """The number of all places of the weight."""
        return self._slots.numel()

    @property
    def is_whole(self) -> bool:
        """Whether blocks have been everywhere."""
        return self.count == self.most

    @property
    def nbytes(self) -> int:
        """The bytes of host memory that the store holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._slots, self._values))

    def at(self, positions: Tensor) -> Tensor:
        """Return the values at `positions int64[2, k]`, all of which are known: `[k, b, b]`."""
        return self._values.index_select(0, self._slots[positions[0], positions[1]])

    def add(self, weight: Tensor, positions: Tensor) -> None:
        """Keep the blocks of `weight [m, n]` at those of `positions` that are new; the others keep what they have."""
        new = positions[:, self._slots[positions[0], positions[1]] < 0]
        if new.shape[1]:
            values = read_places(weight, new.to(weight.device), self.block_size)
            self.put(new, values.to("cpu", self._values.dtype))

    def put_missing(self, other: "Originals") -> None:
        """Keep what `other` holds at places that are not known here."""
        places = other.places
        missing = places[:, self._slots[places[0], places[1]] < 0]
        self.put(missing, other.at(missing))

    def put(self, positions: Tensor, values: Tensor) -> None:
        """Keep `values [k, b, b]` at `positions`, none of which is known yet."""
        end = self._count + positions.shape[1]
        if end > len(self._values):
            # Doubled, so that many moves copy little; the first store, of blocks that may never move, is exact.
            larger = self._values.new_empty((max(end, min(2 * self._count, self._slots.numel())), *values.shape[1:]))
            larger[: self._count] = self._values[: self._count]
            self._values = larger
        self._values[self._count : end] = values
        self._slots[positions[0], positions[1]] = torch.arange(self._count, end, device="cpu")
        self._count = end

    def fill(self, matrix: Tensor, value: float) -> None:
        """Set `matrix [m, n]` to `value` at every place."""
        blocks = local(matrix).new_full((self._count, self.block_size, self.block_size), value)
        self.copier(matrix).write(blocks)

    def restore(self, matrix: Tensor) -> None:
        """Write the values from before training into `matrix [m, n]`, at every place."""
        self.copier(matrix).write(self.values.to(matrix.device))

    def copier(self, matrix: Tensor) -> BlockCopier | ShardCopier:
        """Return what copies the blocks of `matrix [m, n]` at `places` out and in."""
        return copier_of(matrix, self.places.to(matrix.device), self.block_size)
