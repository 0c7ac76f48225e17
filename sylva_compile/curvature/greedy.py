"""The greedy choice of blocks: each block is chosen by its gain after the Newton steps of the blocks before it.

The block gain is the decrease of the loss that a block could win alone. Blocks of one row or one column see the same
output gradients or the same inputs. The best of them therefore win largely the same decrease, and taking the highest
gains crowds the choice there. The greedy choice takes the blocks one after another on the same quadratic model
`⟨Γ, Δ⟩ + ½⟨Δ, G Δ A⟩`: the block of the highest gain takes its Newton step, the step changes the gradient of the model
everywhere, and the new gradient gives the gains for the next block (matching pursuit, with blocks as atoms; every block
steps once).

    Γ ← Γ − G[:, B] · P · A[B, :],     P = (G_BB + λ_G I)⁻¹ Γ_B (A_BB + λ_A I)⁻¹

In coordinates in which the damped diagonal blocks of both factors are identities, a gain is half a squared norm and a
step takes one product of `[m, b]` and `[b, n]`. A choice of k blocks costs `2·k·b·m·n` operations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.curvature.factor import Covariance
from sylva_compile.curvature.importance import damped_cholesky
from sylva_compile.kernels.blocks import grid_shape


def choose_greedily(
    gradient: Tensor, a: Covariance, g: Covariance, block_size: int, damping: float, count: int, allowed: Tensor
) -> Tensor:
    """Return the chosen blocks as a map.

    Args:
        gradient: Γ `[m, n]`, float64.
        a: A `[n, n]`.
        g: G `[m, m]`.
        block_size: b.
        damping: λ as a fraction of each factor's mean diagonal.
        count: blocks to choose; no more than are allowed.
        allowed: the blocks to choose from, `bool [ceil(m/b), ceil(n/b)]`.

    Returns:
        `bool [ceil(m/b), ceil(n/b)]` on the CPU, true for `count` blocks; of equal gains, the first block wins.

    Raises:
        ArithmeticError: the gradient of the model overflows; damping is too low for factors that are not positive.
    """
    (m, n), b = gradient.shape, block_size
    outputs, inputs = Whitened(g, m, b, damping), Whitened(a, n, b, damping)
    pursuit = Pursuit(gradient, outputs, inputs, allowed)
    for _ in range(count):
        pursuit.take()
    return pursuit.chosen()


class Pursuit:
    """The greedy choice in one matrix, a block at a time."""

    def __init__(
        self, gradient: Tensor, outputs: "Whitened", inputs: "Whitened", allowed: Tensor, squares: Tensor | None = None
    ) -> None:
        """Start without a block.

        Args:
            gradient: Γ `[m, n]`, float64.
            outputs: G `[m, m]`.
            inputs: A `[n, n]`.
            allowed: the blocks to choose from, `bool [ceil(m/b), ceil(n/b)]`.
            squares: working memory, float64 `[ceil(m/b)·b, ceil(n/b)·b]`, that several choices may share.
        """
        (m, n), b = gradient.shape, outputs.block_size
        mb, nb = grid_shape(gradient.shape, b)
        left = outputs.rows(F.pad(gradient, (0, nb * b - n, 0, mb * b - m)))
        self._left = inputs.rows(left.t()).t().contiguous()
        self._outputs, self._inputs, self._allowed = outputs, inputs, allowed
        self._free = allowed.to(gradient.device).clone()
        self._room = int(allowed.sum())
        self._squares = torch.empty_like(self._left) if squares is None else squares
        self._ones = self._left.new_ones(b, 1)
        self._best: tuple[float, int] | None = None

    def gain(self) -> float:
        """Return the gain of the best block that is still free; -inf if none is.

        Raises:
            ArithmeticError: it is not finite.
        """
        return 0.5 * self._find()[0] if self._room else -math.inf

    def take(self) -> None:
        """Choose the best free block; there is one. Raises ArithmeticError as `gain` does."""
        b, (_, nb) = self._outputs.block_size, self._free.shape
        row, column = divmod(self._find()[1], nb)
        self._best = None
        self._room -= 1
        self._free[row, column] = False
        step = self._left[row * b : (row + 1) * b, column * b : (column + 1) * b].clone()
        self._left.addmm_(self._outputs.columns(row), step @ self._inputs.columns(column).t(), alpha=-1.0)

    def chosen(self) -> Tensor:
        """Return the map of the blocks chosen so far, `bool [ceil(m/b), ceil(n/b)]`, on the CPU."""
        return (self._allowed.to(self._free.device) & ~self._free).cpu()

    def _find(self) -> tuple[float, int]:
        """Return twice the gain of the best free block, and its place in the flat grid."""
        if self._best is None:
            b, (mb, nb) = self._outputs.block_size, self._free.shape
            # Squared norms of the tiles are twice the gains. A product takes half the time of a strided sum.
            squares = torch.mul(self._left, self._left, out=self._squares)
            norms = (squares.view(-1, b) @ self._ones).view(mb, b, nb).sum(1)
            norms.masked_fill_(~self._free, -torch.inf)
            highest, place = norms.view(-1).max(0)
            # Read both numbers at once: each read waits for the device.
            found, at = torch.stack([highest, place.to(highest.dtype)]).tolist()
            if not math.isfinite(found):
                raise ArithmeticError("a gain of the quadratic model is not finite")
            self._best = found, int(at)
        return self._best


class Whitened:
    """B `[d, d]` in coordinates in which its damped diagonal blocks are identities: `L⁻¹ (B + λ I) L⁻ᵀ`."""

    def __init__(self, covariance: Covariance, size: int, block_size: int, damping: float) -> None:
        """Factorise the diagonal blocks of `covariance [d, d]`, d = `size`; λ as for `damped_cholesky`."""
        self.covariance, self.size, self.block_size = covariance, size, block_size
        factors = damped_cholesky(covariance.diagonal_blocks(block_size), size, damping)
        unit = torch.eye(block_size, dtype=factors.dtype, device=factors.device)
        self.unit = unit
        self.inverses = torch.linalg.solve_triangular(factors, unit.expand_as(factors), upper=False)

    def rows(self, matrix: Tensor) -> Tensor:
        """Return `L⁻¹ X` for X `[ceil(d/b)·b, c]`."""
        tiles: Tensor = self.inverses @ matrix.unflatten(0, (-1, self.block_size))
        return tiles.flatten(0, 1)

    def columns(self, block: int) -> Tensor:
        """Return the columns of one block, `[ceil(d/b)·b, b]`, zero beyond d."""
        b = self.block_size
        start, stop = block * b, min((block + 1) * b, self.size)
        columns = self.covariance.columns(start, stop)
        padded = F.pad(columns, (0, start + b - stop, 0, len(self.inverses) * b - self.size))
        found: Tensor = self.rows(padded) @ self.inverses[block].t()
        # No entry of a positive definite matrix with unit diagonal exceeds 1; entries of a truncated hierarchy may.
        found.clamp_(-1.0, 1.0)
        found[start : start + b] = self.unit
        return found
