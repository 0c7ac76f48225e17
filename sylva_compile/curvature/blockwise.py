"""Kronecker factors that keep their diagonal blocks alone, `d·b` numbers per factor.

The gain of a block depends on the factors through these blocks alone, so the scores equal those of exact K-FAC.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.curvature.factor import Covariance, Factor


class BlockFactor(Factor):
    """The b x b blocks on the diagonal of `Σ z zᵀ`, `[ceil(d/b), b, b]`, zero beyond d."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, *, block_size: int) -> None:
        """Start with blocks of zero for a factor of d = `size`."""
        self.size = size
        self.blocks = torch.zeros(-(-size // block_size), block_size, block_size, dtype=dtype, device=device)

    def update(self, tokens: Tensor) -> None:
        """Add the diagonal blocks of `Zᵀ Z` for tokens Z `[T, d]`."""
        count, b, _ = self.blocks.shape
        padded = F.pad(tokens.to(self.blocks.dtype), (0, count * b - self.size))
        groups = padded.unflatten(1, (count, b)).transpose(0, 1)
        self.blocks.baddbmm_(groups.transpose(1, 2), groups)

    def state(self) -> list[Tensor]:
        """Return the blocks, `[ceil(d/b), b, b]`."""
        return [self.blocks]

    def mean(self, scale: Tensor) -> "BlockCovariance":
        """Return `scale · Σ z zᵀ` in float64."""
        return BlockCovariance(self.blocks.double() * scale)


class BlockCovariance(Covariance):
    """The diagonal blocks of B `[d, d]`; B itself is unknown, and so are its products, columns and inverse."""

    def __init__(self, blocks: Tensor) -> None:
        """Keep `blocks [ceil(d/b), b, b]`, zero beyond d."""
        self.blocks = blocks

    def matmul(self, right: Tensor) -> Tensor:
        """Raise NotImplementedError: diagonal blocks alone give no products."""
        raise NotImplementedError("diagonal blocks alone give no products; gather whole factors for this score")

    def columns(self, start: int, stop: int) -> Tensor:
        """Raise NotImplementedError: diagonal blocks alone give no columns."""
        raise NotImplementedError("diagonal blocks alone give no columns; gather whole factors for this score")

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Raise NotImplementedError: diagonal blocks alone give no inverse."""
        raise NotImplementedError("diagonal blocks alone give no inverse; gather whole factors for this score")

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """Return the blocks `[ceil(d/b), b, b]`; `block_size` must equal the b for which they were gathered."""
        assert block_size == self.blocks.shape[-1]
        return self.blocks
