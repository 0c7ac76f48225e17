"""The inverse of a hierarchical matrix, built from the leaves up and never formed (Sylva, eqn 5-8, corrected).

With the inverses of a node's two halves in `D = blockdiag(B11⁻¹, B22⁻¹)`, `P = blockdiag(U, V)` and, as B21 = B12ᵀ,
`Q = Pᵀ`, `C = [[0, Λ], [Λ, 0]]`, the node's inverse is

    B⁻¹ = D - D P C (I + Q D P C)⁻¹ Q D

The paper's K (eqn 5) has Λ where Λ⁻¹ belongs, and its R (eqn 7) has `V12⁻¹ B22` for `V12ᵀ B22⁻¹`. Here P absorbs
Λ^½ on both sides, so that C becomes `J = [[0, I], [I, 0]]`, its own inverse. With `E = Q D P = R Rᵀ` (block diagonal,
R = E^½),

    C (I + Q D P C)⁻¹ = J (I + E J)⁻¹ = J - J R (I + R J R)⁻¹ R J

needs no Λ⁻¹ (zero singular values are safe), is symmetric, and shows whether B is positive definite: B is if and only
if both halves and `I + R J R` are, because `D^½ B D^½` and `I + R J R` share all eigenvalues other than 1.

Cutting the off-diagonal blocks to rank r can make B indefinite, and on real layers it nearly always does. The singular
values of `R1 R2`, which for an exact covariance are the canonical correlations of the two halves and below 1, come out
up to 5. Raising the damping until B + λ I is positive definite took up to 10⁴ times the wanted damping, which buries
the curvature. By default (`indefinite="limit"`) the inverse keeps the damping and limits these singular values to 0.9
in all nodes of such a factor, which changes each B12 least in the metric of its halves. On MiniLM this agrees better
with exact factors at every rank. `indefinite="raise"` raises the damping.

`HierarchyInverse` keeps the leaves' Cholesky factors, and `S = D P` and the core `C (I + Q D P C)⁻¹` of every node: as
much memory as B itself.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sylva_compile.curvature.tree_layout import TreeLayout

log = logging.getLogger(__name__)

Indefinite = Literal["limit", "raise"]
"""Treatment of a factor with a node that its cut to rank r left indefinite: limit correlations, or raise damping."""

_ATTEMPTS = 20
_LIMIT = 0.9


class HierarchyInverse:
    """`(B + λ I)⁻¹` for a hierarchical matrix B [*, d, d]: gives products and the diagonal.

    Attributes:
        layout: the tree.
        damping: λ as used, `[*]`.
        limited: factors whose correlations were limited, `bool[*]`.
    """

    def __init__(
        self,
        layout: TreeLayout,
        leaves: Tensor,
        bases: Sequence[Tensor],
        damping: float,
        mean_diagonal: Tensor,
        *,
        indefinite: Indefinite = "limit",
    ) -> None:
        """Factorise B + λ I; `Hierarchy.inverse` passes the parts of B.

        Args:
            layout: the tree.
            leaves: the leaves of B, `[*, 2^K, s, s]`.
            bases: `U Λ^½` and `V Λ^½` of every node, for each level k `[*, 2^k, 2, h, r]`.
            damping: λ as a fraction of the mean diagonal.
            mean_diagonal: mean of the diagonal of B, `[*]`.
            indefinite: treatment of a factor with a node that is not positive definite: "limit" the correlations in its
                nodes, or "raise" its λ tenfold as often as needed. A leaf that is not positive definite always raises
                λ. The log reports either once per call.

        Raises:
            ArithmeticError: B holds values that are not finite, or stays indefinite after 20 attempts.
        """
        self.layout, self._matrix_leaves, self._bases = layout, leaves, bases
        if not bool(mean_diagonal.isfinite().all()):
            raise ArithmeticError("a hierarchical factor is not finite; are the activations finite?")
        wanted = lam = (damping * mean_diagonal).clamp(min=torch.finfo(mean_diagonal.dtype).tiny)
        self.limited = torch.zeros_like(mean_diagonal, dtype=torch.bool)
        for _ in range(_ATTEMPTS):
            leaf_failed, node_failed = self._factorise(lam)
            if not bool((leaf_failed | node_failed).any()):
                break
            if indefinite == "limit":
                # A node that fails although it is limited has ill-conditioned halves, which more damping mends.
                raised = leaf_failed | (node_failed & self.limited)
                self.limited = self.limited | (node_failed & ~leaf_failed)
            else:
                raised = leaf_failed | node_failed
            lam = torch.where(raised, 10 * lam, lam)
        else:
            raise ArithmeticError("a hierarchical factor stays indefinite under any damping; are activations finite?")
        self.damping = lam
        changed = self.limited | (lam != wanted)
        if bool(changed.any()):
            # At low rank this happens to most of a model's hundreds of factors: not worth a warning.
            log.info(
                "%d of %d factors not positive definite: correlations limited in %d, damping raised up to %g times.",
                int(changed.sum()),
                changed.numel(),
                int(self.limited.sum()),
                float((lam / wanted).max()),
            )

    def _factorise(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Factorise the leaves of B + λ I and compute the sides S and the cores of its nodes.

        Returns:
            The factors in which a leaf is not positive definite, and those in which a node is not, both `bool[*]`.
        """
        depth = self.layout.depth
        unit = torch.eye(self.layout.leaf_size, dtype=lam.dtype, device=lam.device)
        self._leaves, info = torch.linalg.cholesky_ex(self._matrix_leaves + lam[..., None, None, None] * unit)
        leaf_failed = (info != 0).any(-1)
        node_failed = torch.zeros_like(leaf_failed)
        self._sides: list[Tensor] = [self._solve_leaves(basis.flatten(-4, -2)) for basis in self._bases]
        self._cores: list[Tensor] = [lam.new_empty(0)] * depth
        for level in reversed(range(depth)):
            side = self._by_half(self._sides[level], level)
            gram = self._bases[level].mT @ side
            self._cores[level], bad = _core(0.5 * (gram + gram.mT), self.limited)
            node_failed = node_failed | bad.any(-1)
            for above in range(level):
                self._sides[above] = self._lift(self._sides[above], level)
        return leaf_failed, node_failed

    def _by_half(self, matrix: Tensor, level: int) -> Tensor:
        """Return a view of `matrix [*, P, c]` by the halves of the nodes of `level`, `[*, 2^k, 2, h, c]`."""
        halves: Tensor = matrix.unflatten(-2, (2**level, 2, self.layout.half(level)))
        return halves

    def _solve_leaves(self, right: Tensor) -> Tensor:
        """Return the product of the leaves' inverses and `right [*, P, c]`, `[*, P, c]`."""
        return torch.cholesky_solve(right.unflatten(-2, (self.layout.leaves, -1)), self._leaves).flatten(-3, -2)

    def _lift(self, solved: Tensor, level: int) -> Tensor:
        """Return `B⁻¹ X` for the nodes of `level` from `D X`, their halves' solutions, both `[*, P, c]`.

        It is `D X - S core Pᵀ D X`.
        """
        halves = self._by_half(solved, level)
        inner = (self._bases[level].mT @ halves).flatten(-3, -2)
        outer = (self._cores[level] @ inner).unflatten(-2, (2, -1))
        correction: Tensor = (self._by_half(self._sides[level], level) @ outer).flatten(-4, -2)
        return solved - correction

    def solve(self, right: Tensor) -> Tensor:
        """Return `(B + λ I)⁻¹ X` for X `[*, d, c]`."""
        solved = self._solve_leaves(self.layout.spread(right, right.dim() - 2))
        for level in reversed(range(self.layout.depth)):
            solved = self._lift(solved, level)
        return self.layout.gather(solved, solved.dim() - 2)

    def diagonal(self) -> Tensor:
        """Return the diagonal of `(B + λ I)⁻¹`, `[*, d]`.

        For every positive definite B + λ I entry j is at least `1 / (B_jj + λ)`. Entries that rounding brings below
        that bound are set to it, so that callers may divide by them.
        """
        result = torch.cholesky_inverse(self._leaves).diagonal(dim1=-2, dim2=-1).flatten(-2)
        for level, core in enumerate(self._cores):
            side = self._by_half(self._sides[level], level)
            r = side.shape[-1]
            own = torch.stack([core[..., :r, :r], core[..., r:, r:]], dim=-3)
            result = result - ((side @ own) * side).sum(-1).flatten(-3)
        damped = self._matrix_leaves.diagonal(dim1=-2, dim2=-1).flatten(-2) + self.damping[..., None]
        return self.layout.gather(torch.maximum(result, damped.reciprocal()), result.dim() - 1)


def _core(gram: Tensor, limited: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cores `J' - J' R (I + R J' R)⁻¹ R J'`; J' equals J except in factors that are limited.

    `R1 R2 = X Σ Yᵀ`. If Σ' replaces Σ, `J'12 = I - R2 Y Σ⁻¹ (Σ - Σ') Σ⁻¹ Xᵀ R1` replaces J12 = I, so that
    `R1 J'12 R2 = X Σ' Yᵀ`.

    Args:
        gram: E = `Pᵀ D P` of the two halves of each node, `[*, nodes, 2, r, r]`, positive semidefinite up to rounding.
        limited: factors whose Σ is limited, `bool[*]`.

    Returns:
        The cores `[*, nodes, 2r, 2r]`, and the nodes that are not positive definite, `bool[*, nodes]`.
    """
    # A failed leaf gives values that are not finite. eigh would raise on them; the caller factorises again anyway.
    gram = torch.where(gram.isfinite().all(-1).all(-1)[..., None, None], gram, 0)
    spectrum, vectors = torch.linalg.eigh(gram)
    first, second = ((vectors * spectrum.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT).unbind(-3)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(first)
    none = torch.zeros_like(first)
    mixed, swap = first @ second, unit
    if bool(limited.any()):
        x, sigma, yt = torch.linalg.svd(mixed)
        over = torch.where(limited[..., None, None], (sigma - _LIMIT).clamp(min=0), 0)
        mixed = mixed - (x * over[..., None, :]) @ yt
        share = over / sigma.square().clamp(min=torch.finfo(sigma.dtype).tiny)
        swap = unit - second @ (yt.mT * share[..., None, :]) @ x.mT @ first
    factor, info = torch.linalg.cholesky_ex(_join(unit, mixed, mixed.mT, unit))
    half = torch.linalg.solve_triangular(factor, _join(none, first @ swap, second @ swap.mT, none), upper=False)
    return _join(none, swap, swap.mT, none) - half.mT @ half, info != 0


def _join(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return `[[a, b], [c, d]]`, `[*, 2r, 2r]`, from tensors `[*, r, r]`."""
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)
