"""The layout of a hierarchical matrix: its rows and columns in the slots of a binary tree.

All nodes of a level lie in one tensor, though 2^K need not divide d. Node j of level k covers the rows and columns from
`j·d // 2^k` up to `(j + 1)·d // 2^k`, so that the sizes of nodes differ by one at most. Each leaf has s = ceil(d / 2^K)
slots; a leaf of size s - 1 leaves its last slot empty. Empty slots are zero in leaves and bases, hence they never touch
a real row: products, inverses and solutions are exact for the real rows, and `TreeLayout.gather` drops the empty slots
from results.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeLayout:
    """Slots for the rows and columns of a matrix `[d, d]`, d = `size`, in a tree of K = `depth` splits."""

    size: int
    depth: int

    @property
    def leaves(self) -> int:
        """Number of leaves, 2^K."""
        return int(2**self.depth)

    @property
    def leaf_size(self) -> int:
        """Slots of a leaf, s."""
        return -(-self.size // self.leaves)

    @property
    def slots(self) -> int:
        """Slots of the whole matrix, P >= d."""
        return self.leaves * self.leaf_size

    def half(self, level: int) -> int:
        """Return the number of slots of half a node of `level`, h: the height of its U and of its V."""
        return self.slots >> (level + 1)

    def index(self, device: torch.device) -> Tensor:
        """Return the slot of every row, `int64[d]`."""
        rows = torch.arange(self.size, device=device)
        leaf = ((rows + 1) * self.leaves - 1) // self.size
        return leaf * self.leaf_size + rows - leaf * self.size // self.leaves

    def spread(self, tensor: Tensor, axis: int) -> Tensor:
        """Return `tensor` with the d entries along `axis` moved to their P slots; empty slots are zero.

        Where no slot is empty, it returns `tensor` itself.
        """
        if self.slots == self.size:
            return tensor
        shape = list(tensor.shape)
        shape[axis] = self.slots
        return tensor.new_zeros(shape).index_copy_(axis, self.index(tensor.device), tensor)

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """Return `tensor` with the P slots along `axis` reduced to the d real entries: the inverse of `spread`."""
        return tensor if self.slots == self.size else tensor.index_select(axis, self.index(tensor.device))
