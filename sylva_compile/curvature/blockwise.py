"""The diagonal blocks of the factors: all that the block gain reads, `d·b` numbers a factor.

The gain of a block depends on the factors through these blocks alone, so the scores equal those of exact K-FAC.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.curvature.factor import Covariance, Factor


class BlockFactor(Factor):
    """The b x b blocks on the diagonal of `Σ z zᵀ`, `[ceil(d/b), b, b]`, zero beyond d."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, *, block_size: int) -> None:
        """Zero, of d = `size`."""
        self.size = size
        self.blocks = torch.zeros(-(-size // block_size), block_size, block_size, dtype=dtype, device=device)

    def update(self, tokens: Tensor) -> None:
        """Add the blocks of `Zᵀ Z` for Z `[T, d]`."""
        count, b, _ = self.blocks.shape
        lines = F.pad(tokens.to(self.blocks.dtype), (0, count * b - self.size))
        groups = lines.unflatten(1, (count, b)).transpose(0, 1)
        self.blocks.baddbmm_(groups.transpose(1, 2), groups)

    def state(self) -> list[Tensor]:
        """The blocks."""
        return [self.blocks]

    def mean(self, scale: Tensor) -> "BlockCovariance":
        """`scale · Σ z zᵀ` in float64."""
        return BlockCovariance(self.blocks.double() * scale)


class BlockCovariance(Covariance):
    """Of B `[d, d]`, the blocks on the diagonal; there is nothing else to read."""

    def __init__(self, blocks: Tensor) -> None:
        """Of `blocks [ceil(d/b), b, b]`."""
        self.blocks = blocks

    def matmul(self, lines: Tensor) -> Tensor:
        """Not to be had."""
        raise NotImplementedError("diagonal blocks alone give no products; gather whole factors for this score")

    def columns(self, start: int, stop: int) -> Tensor:
        """Not to be had."""
        raise NotImplementedError("diagonal blocks alone give no columns; gather whole factors for this score")

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Not to be had."""
        raise NotImplementedError("diagonal blocks alone give no inverse; gather whole factors for this score")

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """The blocks; `block_size` must be the one that they were gathered for."""
        assert block_size == self.blocks.shape[-1]
        return self.blocks
