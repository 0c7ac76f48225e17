"""The inverse of a hierarchical matrix, from the leaves up, without ever forming it (Sylva, eqn 5-8, corrected).

With the inverses of a node's two halves in `D = blockdiag(B11⁻¹, B22⁻¹)`, `P = blockdiag(U, V)` and, as B21 = B12ᵀ,
`Q = Pᵀ`, `C = [[0, Λ], [Λ, 0]]`, the node's inverse is

    B⁻¹ = D - D P C (I + Q D P C)⁻¹ Q D

The paper's K (eqn 5) has Λ where Λ⁻¹ belongs, and its R (eqn 7) has `V12⁻¹ B22` for `V12ᵀ B22⁻¹`. Here Λ^½ goes into P
from both sides, so that C becomes `J = [[0, I], [I, 0]]`, its own inverse. With `E = Q D P = R Rᵀ` (block diagonal,
R = E^½),

    C (I + Q D P C)⁻¹ = J (I + E J)⁻¹ = J - J R (I + R J R)⁻¹ R J

needs no Λ⁻¹ (zero singular values are safe), is symmetric, and says whether B is positive definite: it is if and only
if both halves are and `I + R J R` is, because `D^½ B D^½` and `I + R J R` share all eigenvalues but ones.

Cutting the off-diagonal blocks to rank r can make B indefinite, and on real layers it nearly always does: the singular
values of `R1 R2`, which for an exact covariance are canonical correlations of the two halves and below 1, come out up
to 5. Raising the damping until they fit took up to 10⁴ times the wanted one, which buries the curvature. By default the
values of such a factor's nodes are limited to 0.9 instead, the least change of each B12 in the metric of its halves,
and the damping stays; on MiniLM this agrees better with exact factors at every rank. `indefinite="raise"` raises it.

Kept are the leaves' Cholesky factors, `S = D P` and the core `C (I + Q D P C)⁻¹` of every node: as much as B itself.
"""

import logging
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sylva_compile.curvature.hierarchy import Hierarchy

log = logging.getLogger(__name__)

Indefinite = Literal["limit", "raise"]
"""What becomes of a factor with a node whose cut to rank r is not positive definite."""

_ATTEMPTS = 20
_LIMIT = 0.9


class HierarchyInverse:
    """`(B + λ I)⁻¹` of a `Hierarchy` B [*, d, d], for products and its diagonal."""

    def __init__(self, matrix: "Hierarchy", damping: float, *, indefinite: Indefinite = "limit") -> None:
        """Factorise B + λ I; λ is `damping` times B's mean diagonal.

        Args:
            matrix: B.
            damping: λ as a fraction of B's mean diagonal.
            indefinite: what to do about a factor with a node that is not positive definite: "limit" the correlations
                in its nodes, or "raise" its λ tenfold, as often as need be. A leaf that is not positive definite always
                raises λ. The log says so once for each call.

        Raises:
            ArithmeticError: B holds values that are not finite.
        """
        self.layout, self._matrix = matrix.layout, matrix
        mean = matrix.mean_diagonal()
        if not bool(mean.isfinite().all()):
            raise ArithmeticError("a hierarchical factor is not finite; are the activations finite?")
        wanted = lam = (damping * mean).clamp(min=torch.finfo(mean.dtype).tiny)
        self.limited = torch.zeros_like(mean, dtype=torch.bool)
        """Whose nodes were limited, `bool[*]`."""
        for _ in range(_ATTEMPTS):
            leaf_failed, node_failed = self._factorise(matrix, lam)
            if not bool((leaf_failed | node_failed).any()):
                break
            if indefinite == "limit":
                # A node that fails though it is limited stands on ill-conditioned halves; damping mends those.
                raised = leaf_failed | (node_failed & self.limited)
                self.limited = self.limited | (node_failed & ~leaf_failed)
            else:
                raised = leaf_failed | node_failed
            lam = torch.where(raised, 10 * lam, lam)
        else:
            raise ArithmeticError("a hierarchical factor stays indefinite under any damping; are activations finite?")
        self.damping = lam
        """λ as used, `[*]`."""
        changed = self.limited | (lam != wanted)
        if bool(changed.any()):
            # The ordinary case at low rank, for each of hundreds of factors: not worth a warning.
            log.info(
                "%d of %d factors not positive definite: correlations limited in %d, damping raised up to %g times.",
                int(changed.sum()),
                changed.numel(),
                int(self.limited.sum()),
                float((lam / wanted).max()),
            )

    def _factorise(self, matrix: "Hierarchy", lam: Tensor) -> tuple[Tensor, Tensor]:
        """Set leaves and cores of B + λ I; returns in which factors a leaf, or a node, is not positive definite."""
        depth = self.layout.depth
        unit = torch.eye(self.layout.leaf_size, dtype=lam.dtype, device=lam.device)
        self._leaves, info = torch.linalg.cholesky_ex(matrix.leaves + lam[..., None, None, None] * unit)
        leaf_failed = (info != 0).any(-1)
        node_failed = torch.zeros_like(leaf_failed)
        self._bases = matrix.weighted_bases()
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

    def _by_half(self, lines: Tensor, level: int) -> Tensor:
        """`[*, P, c]` as `[*, 2^k, 2, h, c]`."""
        halves: Tensor = lines.unflatten(-2, (2**level, 2, self.layout.half(level)))
        return halves

    def _solve_leaves(self, lines: Tensor) -> Tensor:
        """Apply the inverses of the leaves to `[*, P, c]`."""
        return torch.cholesky_solve(lines.unflatten(-2, (self.layout.leaves, -1)), self._leaves).flatten(-3, -2)

    def _lift(self, lines: Tensor, level: int) -> Tensor:
        """From `D X` to `B⁻¹ X` for the nodes of `level`: `D X - S core Pᵀ D X`, `[*, P, c]`."""
        halves = self._by_half(lines, level)
        inner = (self._bases[level].mT @ halves).flatten(-3, -2)
        outer = (self._cores[level] @ inner).unflatten(-2, (2, -1))
        correction: Tensor = (self._by_half(self._sides[level], level) @ outer).flatten(-4, -2)
        return lines - correction

    def solve(self, lines: Tensor) -> Tensor:
        """`(B + λ I)⁻¹ X` for X `[*, d, c]`."""
        lines = self._solve_leaves(self.layout.spread(lines, lines.dim() - 2))
        for level in reversed(range(self.layout.depth)):
            lines = self._lift(lines, level)
        return self.layout.gather(lines, lines.dim() - 2)

    def diagonal(self) -> Tensor:
        """Diagonal of `(B + λ I)⁻¹`, `[*, d]`.

        It is at least `1 / (B_jj + λ)` for every positive definite B; rounding is kept from going below, so that
        nobody divides by zero.
        """
        result = torch.cholesky_inverse(self._leaves).diagonal(dim1=-2, dim2=-1).flatten(-2)
        for level, core in enumerate(self._cores):
            side = self._by_half(self._sides[level], level)
            r = side.shape[-1]
            own = torch.stack([core[..., :r, :r], core[..., r:, r:]], dim=-3)
            result = result - ((side @ own) * side).sum(-1).flatten(-3)
        line = self._matrix.leaves.diagonal(dim1=-2, dim2=-1).flatten(-2) + self.damping[..., None]
        return self.layout.gather(torch.maximum(result, line.reciprocal()), result.dim() - 1)


def _core(gram: Tensor, limited: Tensor) -> tuple[Tensor, Tensor]:
    """`J' - J' R (I + R J' R)⁻¹ R J'` from the two halves' `Pᵀ D P`; J' is J but for nodes that are limited.

    `R1 R2 = X Σ Yᵀ`. With Σ' for Σ, `J'12 = I - R2 Y Σ⁻¹ (Σ - Σ') Σ⁻¹ Xᵀ R1` is the change of J12 with
    `R1 J'12 R2 = X Σ' Yᵀ`.

    Args:
        gram: E, `[*, nodes, 2, r, r]`, positive semidefinite up to rounding.
        limited: factors whose Σ is limited, `bool[*]`.

    Returns:
        The cores `[*, nodes, 2r, 2r]`, and which nodes are not positive definite, `bool[*, nodes]`.
    """
    # A leaf that failed leaves values that are not finite; eigh would raise on them, and the factor is done again.
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
    """`[[a, b], [c, d]]` from tensors `[*, r, r]`."""
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)
