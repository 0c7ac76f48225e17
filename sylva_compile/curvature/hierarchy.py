"""Symmetric hierarchical matrices (HODLR): the Kronecker factors of a large layer at nearly linear memory.

A covariance B [d, d] is split K times (Sylva, eqn 1-4). The diagonal blocks of the last split, the leaves, are exact.
Every split keeps its upper off-diagonal block as a singular value decomposition of rank r, and the lower one is its
transpose, so that it is stored once:

    B = [[B11, B12], [B12ᵀ, B22]],     B12 ≈ U Λ Vᵀ        U, V [h, r],  Λ [r]

Memory: d · s for leaves of s = ceil(d / 2^K) lines, and d · r for the bases of each of the K levels.

Layout. All nodes of a level lie in one tensor, though 2^K need not divide d. Node j of level k covers the lines from
`j·d // 2^k` up to `(j + 1)·d // 2^k`, so that sizes differ by one at most. Each leaf has s slots; one with s - 1 lines
leaves its last slot empty. Empty slots are zero in leaves and bases, hence they never touch a real line: products,
inverses and solutions are exact for the real lines, and the empty ones are dropped on the way out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.curvature.factor import Covariance
from sylva_compile.curvature.hierarchy_inverse import HierarchyInverse


@dataclass(frozen=True)
class TreeLayout:
    """Where the lines of a matrix of `size` lie in the slots of a tree of `depth` splits."""

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
        """Slots of half a node of `level`: the height of its U and of its V."""
        return self.slots >> (level + 1)

    def index(self, device: torch.device) -> Tensor:
        """The slot of every line, `int64[d]`."""
        lines = torch.arange(self.size, device=device)
        leaf = ((lines + 1) * self.leaves - 1) // self.size
        return leaf * self.leaf_size + lines - leaf * self.size // self.leaves

    def spread(self, tensor: Tensor, axis: int) -> Tensor:
        """Lines to slots along `axis`, d -> P; empty slots are zero. The same tensor where every slot has a line."""
        if self.slots == self.size:
            return tensor
        shape = list(tensor.shape)
        shape[axis] = self.slots
        return tensor.new_zeros(shape).index_copy_(axis, self.index(tensor.device), tensor)

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """Slots to lines along `axis`, P -> d."""
        return tensor if self.slots == self.size else tensor.index_select(axis, self.index(tensor.device))


@dataclass(frozen=True)
class Hierarchy(Covariance):
    """Symmetric B [*, d, d]; leading dimensions `*`, if any, are several factors of one shape.

    Attributes:
        layout: the tree.
        leaves: `[*, 2^K, s, s]`.
        bases: for each level k, `[*, 2^k, 2, h, r]`: U and V of every node. Columns have length one, or are zero.
        values: for each level k, Λ as `[*, 2^k, r]`, not negative.
    """

    layout: TreeLayout
    leaves: Tensor
    bases: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def from_dense(cls, matrix: Tensor, depth: int, rank: int) -> "Hierarchy":
        """The best hierarchy of `depth` and `rank` of a symmetric `matrix [*, d, d]` (Eckart-Young in every node)."""
        layout = TreeLayout(matrix.shape[-1], depth)
        whole = layout.spread(layout.spread(matrix, matrix.dim() - 1), matrix.dim() - 2)
        bases, values = [], []
        for level in range(depth):
            upper = _diagonal_tiles(whole, 2**level)[..., : layout.half(level), layout.half(level) :]
            u, lam, vt = torch.linalg.svd(upper, full_matrices=False)
            bases.append(torch.stack([u[..., :rank], vt.mT[..., :rank]], dim=-3))
            values.append(lam[..., :rank])
        return cls(layout, _diagonal_tiles(whole, layout.leaves).contiguous(), bases, values)

    def scaled(self, factor: Tensor, dtype: torch.dtype) -> "Hierarchy":
        """`factor · B` in `dtype`; `factor` is a scalar tensor, or `[*]`."""
        factor = factor.to(dtype)
        leaves = self.leaves.to(dtype) * factor[..., None, None, None]
        values = [lam.to(dtype) * factor[..., None, None] for lam in self.values]
        return Hierarchy(self.layout, leaves, [basis.to(dtype) for basis in self.bases], values)

    def weighted_bases(self) -> list[Tensor]:
        """`[U Λ^½; V Λ^½]` of every level, `[*, 2^k, 2, h, r]`; of a node's halves, B12 is the one times the other."""
        return [basis * lam.sqrt()[..., None, None, :] for basis, lam in zip(self.bases, self.values, strict=True)]

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of B, `[*]`."""
        return self.leaves.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / self.layout.size

    def matmul(self, lines: Tensor) -> Tensor:
        """`B · X` for X `[*, d, c]`; costs `2·d·c·(s + 2·K·r)` operations."""
        spread = self.layout.spread(lines, lines.dim() - 2)
        result = (self.leaves @ spread.unflatten(-2, (self.layout.leaves, -1))).flatten(-3, -2)
        for level, (basis, lam) in enumerate(zip(self.bases, self.values, strict=True)):
            halves = spread.unflatten(-2, (2**level, 2, self.layout.half(level)))
            # What leaves through V comes in through U, and the other way round.
            inner = (basis.mT @ halves).flip(-3) * lam[..., None, :, None]
            result = result + (basis @ inner).flatten(-4, -2)
        return self.layout.gather(result, result.dim() - 2)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns of B from `start` up to `stop`, `[*, d, stop - start]`; they cost as much as a product."""
        lines = self.leaves.new_zeros(*self.leaves.shape[:-3], self.layout.size, stop - start)
        lines[..., start:stop, :] = torch.eye(stop - start, dtype=lines.dtype, device=lines.device)
        return self.matmul(lines)

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """The b x b blocks on the diagonal, `[*, ceil(d/b), b, b]`, zero beyond d; they may cross leaves."""
        layout, device = self.layout, self.leaves.device
        count = -(-layout.size // block_size)
        lines = torch.arange(count * block_size, device=device).view(count, block_size)
        outside = lines >= layout.size
        at = layout.index(device)[lines.clamp(max=layout.size - 1)]
        rows, cols = at[:, :, None], at[:, None, :]
        s = layout.leaf_size
        same_leaf = rows // s == cols // s
        inside = ~(outside[:, :, None] | outside[:, None, :])
        blocks = self.leaves.flatten(-3)[..., rows * s + cols % s] * (same_leaf & inside)
        for level, basis in enumerate(self.weighted_bases()):
            h = layout.half(level)
            across = (rows // (2 * h) == cols // (2 * h)) & (rows // h != cols // h) & inside
            if bool(across.any()):
                ends = basis.flatten(-4, -2)[..., at, :]
                blocks = blocks + (ends @ ends.mT) * across
        return blocks

    def dense(self) -> Tensor:
        """B itself, `[*, d, d]`: for tests."""
        batch = self.leaves.shape[:-3]
        lines = torch.eye(self.layout.size, dtype=self.leaves.dtype, device=self.leaves.device)
        return self.matmul(lines.expand(*batch, *lines.shape))

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Diagonal of `(B + λ I)⁻¹`, `[*, d]`; see `sylva_compile.curvature.hierarchy_inverse`."""
        return HierarchyInverse(self, damping).diagonal()

    def solve(self, lines: Tensor, damping: float) -> Tensor:
        """`(B + λ I)⁻¹ X` for X `[*, d, c]`; see `sylva_compile.curvature.hierarchy_inverse`."""
        return HierarchyInverse(self, damping).solve(lines)


def _diagonal_tiles(matrix: Tensor, count: int) -> Tensor:
    """The `count` square tiles on the diagonal of `matrix [*, P, P]`: `[*, count, P/count, P/count]`."""
    size = matrix.shape[-1] // count
    tiles = matrix.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    diagonal: Tensor = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return diagonal
