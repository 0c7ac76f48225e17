"""Blocks that win something together: each is chosen for what those chosen before it have left to win.

The block gain asks what a block could win alone. Blocks of one row or one column see the same output gradients or the
same inputs, so that the best of them largely win the same thing, and taking the highest gains crowds them there. Here
the blocks are chosen one after another on the same quadratic model `⟨Γ, Δ⟩ + ½⟨Δ, G Δ A⟩`: the block of the highest
gain takes its Newton step, the gradient of the model changes everywhere by it, and the next block is chosen by what is
left (matching pursuit, with blocks as atoms; every block steps once).

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
    """The blocks that are chosen, as a map.

    Args:
        gradient: Γ `[m, n]`, float64.
        a: A `[n, n]`.
        g: G `[m, m]`.
        block_size: b.
        damping: λ as a fraction of each factor's mean diagonal.
        count: blocks to choose; no more than are allowed.
        allowed: `bool [ceil(m/b), ceil(n/b)]`.

    Returns:
        `bool [ceil(m/b), ceil(n/b)]` on the CPU, true for `count` blocks; of equals, the first.

    Raises:
        ArithmeticError: the gradient of the model overflows; damping is too low for factors that are not positive.
    """
    (m, n), b = gradient.shape, block_size
    mb, nb = grid_shape(gradient.shape, b)
    outputs, inputs = _Whitened(g, m, b, damping), _Whitened(a, n, b, damping)
    left = outputs.rows(F.pad(gradient, (0, nb * b - n, 0, mb * b - m)))
    left = inputs.rows(left.t()).t().contiguous()
    squares, ones = torch.empty_like(left), left.new_ones(b, 1)
    free = allowed.to(gradient.device).clone()
    for _ in range(count):
        # Twice the gains: squared norms of the tiles. Summed as a product, at half the time of a sum over strides.
        norms = (torch.mul(left, left, out=squares).view(-1, b) @ ones).view(mb, b, nb).sum(1)
        norms.masked_fill_(~free, -torch.inf)
        highest, place = norms.view(-1).max(0)
        # One wait for the device a block.
        found, at = torch.stack([highest, place.to(highest.dtype)]).tolist()
        if not math.isfinite(found):
            raise ArithmeticError("the quadratic model has no bounded steps")
        row, column = divmod(int(at), nb)
        free[row, column] = False
        step = left[row * b : (row + 1) * b, column * b : (column + 1) * b].clone()
        left.addmm_(outputs.columns(row), step @ inputs.columns(column).t(), alpha=-1.0)
    return (allowed.to(free.device) & ~free).cpu()


class _Whitened:
    """B `[d, d]` in coordinates in which its damped diagonal blocks are identities: `L⁻¹ (B + λ I) L⁻ᵀ`."""

    def __init__(self, covariance: Covariance, size: int, block_size: int, damping: float) -> None:
        """Of `covariance [d, d]`, d = `size`; λ as for `damped_cholesky`."""
        self.covariance, self.size, self.block_size = covariance, size, block_size
        factors = damped_cholesky(covariance.diagonal_blocks(block_size), size, damping)
        unit = torch.eye(block_size, dtype=factors.dtype, device=factors.device)
        self.unit = unit
        self.inverses = torch.linalg.solve_triangular(factors, unit.expand_as(factors), upper=False)

    def rows(self, lines: Tensor) -> Tensor:
        """`L⁻¹ X` for X `[ceil(d/b)·b, c]`."""
        tiles: Tensor = self.inverses @ lines.unflatten(0, (-1, self.block_size))
        return tiles.flatten(0, 1)

    def columns(self, block: int) -> Tensor:
        """The columns of one block, `[ceil(d/b)·b, b]`, zero beyond d."""
        b = self.block_size
        start, stop = block * b, min((block + 1) * b, self.size)
        columns = self.covariance.columns(start, stop)
        padded = F.pad(columns, (0, start + b - stop, 0, len(self.inverses) * b - self.size))
        found: Tensor = self.rows(padded) @ self.inverses[block].t()
        # A positive matrix whose diagonal is one holds nothing larger; a truncated hierarchy may.
        found.clamp_(-1.0, 1.0)
        found[start : start + b] = self.unit
        return found
