"""Symmetric hierarchical matrices (HODLR): the Kronecker factors of a large layer at nearly linear memory.

A covariance B [d, d] is split K times (Sylva, eqn 1-4). The diagonal blocks of the last split, the leaves, are exact.
Every split keeps its upper off-diagonal block as a singular value decomposition of rank r. The lower block is the
transpose of the upper one and takes no memory of its own:

    B = [[B11, B12], [B12ᵀ, B22]],     B12 ≈ U Λ Vᵀ        U, V [h, r],  Λ [r]

Memory: d · s numbers for leaves of size s = ceil(d / 2^K), and d · r for the bases of each of the K levels.
`tree_layout.py` says how all nodes of a level lie in one tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.curvature.factor import Covariance
from sylva_compile.curvature.hierarchy_inverse import HierarchyInverse, Indefinite
from sylva_compile.curvature.tree_layout import TreeLayout


@dataclass(frozen=True)
class Hierarchy(Covariance):
    """Symmetric B [*, d, d]; the leading dimensions `*`, if any, count several factors of one shape.

    Attributes:
        layout: the tree.
        leaves: `[*, 2^K, s, s]`.
        bases: for each level k, `[*, 2^k, 2, h, r]`: U and V of every node. Each column has length one or is zero.
        values: for each level k, Λ as `[*, 2^k, r]`, not negative.
    """

    layout: TreeLayout
    leaves: Tensor
    bases: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def from_dense(cls, matrix: Tensor, depth: int, rank: int) -> "Hierarchy":
        """Return the best hierarchy of `depth` and `rank` for a symmetric matrix [*, d, d] (Eckart-Young per node)."""
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
        """Return `factor · B` in `dtype`; `factor` is a scalar tensor, or `[*]`."""
        factor = factor.to(dtype)
        leaves = self.leaves.to(dtype) * factor[..., None, None, None]
        values = [lam.to(dtype) * factor[..., None, None] for lam in self.values]
        return Hierarchy(self.layout, leaves, [basis.to(dtype) for basis in self.bases], values)

    def weighted_bases(self) -> list[Tensor]:
        """Return `U Λ^½` and `V Λ^½` of every node, for each level `[*, 2^k, 2, h, r]`; B12 = `U Λ^½ (V Λ^½)ᵀ`."""
        return [basis * lam.sqrt()[..., None, None, :] for basis, lam in zip(self.bases, self.values, strict=True)]

    def mean_diagonal(self) -> Tensor:
        """Return the mean of the diagonal of B, `[*]`."""
        return self.leaves.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / self.layout.size

    def matmul(self, right: Tensor) -> Tensor:
        """Return `B · X` for X `[*, d, c]`; costs `2·d·c·(s + 2·K·r)` operations."""
        spread = self.layout.spread(right, right.dim() - 2)
        result = (self.leaves @ spread.unflatten(-2, (self.layout.leaves, -1))).flatten(-3, -2)
        for level, (basis, lam) in enumerate(zip(self.bases, self.values, strict=True)):
            halves = spread.unflatten(-2, (2**level, 2, self.layout.half(level)))
            # The flip swaps the halves: B12 = U Λ Vᵀ reads the second half, and B21 = V Λ Uᵀ the first.
            inner = (basis.mT @ halves).flip(-3) * lam[..., None, :, None]
            result = result + (basis @ inner).flatten(-4, -2)
        return self.layout.gather(result, result.dim() - 2)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns of B from `start` up to `stop`, `[*, d, stop - start]`; they cost as much as a product."""
        unit = self.leaves.new_zeros(*self.leaves.shape[:-3], self.layout.size, stop - start)
        unit[..., start:stop, :] = torch.eye(stop - start, dtype=unit.dtype, device=unit.device)
        return self.matmul(unit)

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """Return the b x b blocks on the diagonal, `[*, ceil(d/b), b, b]`, zero beyond d; they may cross leaves."""
        layout, device = self.layout, self.leaves.device
        count = -(-layout.size // block_size)
        index = torch.arange(count * block_size, device=device).view(count, block_size)
        outside = index >= layout.size
        at = layout.index(device)[index.clamp(max=layout.size - 1)]
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
        """Return B as a dense matrix, `[*, d, d]`: for tests."""
        batch = self.leaves.shape[:-3]
        unit = torch.eye(self.layout.size, dtype=self.leaves.dtype, device=self.leaves.device)
        return self.matmul(unit.expand(*batch, *unit.shape))

    def inverse(self, damping: float, *, indefinite: Indefinite = "limit") -> HierarchyInverse:
        """Factorise `B + λ I`; λ is `damping` times the mean diagonal of B. See `HierarchyInverse`."""
        leaves, bases, mean = self.leaves, self.weighted_bases(), self.mean_diagonal()
        return HierarchyInverse(self.layout, leaves, bases, damping, mean, indefinite=indefinite)

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Return the diagonal of `(B + λ I)⁻¹`, `[*, d]`; λ as for `inverse`."""
        return self.inverse(damping).diagonal()

    def solve(self, right: Tensor, damping: float) -> Tensor:
        """Return `(B + λ I)⁻¹ X` for X `[*, d, c]`; λ as for `inverse`."""
        return self.inverse(damping).solve(right)


def _diagonal_tiles(matrix: Tensor, count: int) -> Tensor:
    """Return the `count` square tiles on the diagonal of `matrix [*, P, P]`: `[*, count, P/count, P/count]`."""
    size = matrix.shape[-1] // count
    tiles = matrix.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    diagonal: Tensor = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return diagonal
