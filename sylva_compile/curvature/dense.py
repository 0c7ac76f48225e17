"""Factors in full, d² numbers each: exact K-FAC. They stay in the house as the oracle."""

import torch
from torch import Tensor

from sylva_compile.curvature.factor import Covariance, Factor
from sylva_compile.curvature.importance import damped_cholesky, diagonal_blocks


class DenseFactor(Factor):
    """`Σ z zᵀ` `[d, d]`."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Zero, of d = `size`."""
        self.total = torch.zeros(size, size, dtype=dtype, device=device)

    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for Z `[T, d]`."""
        lines = tokens.to(self.total.dtype)
        self.total.addmm_(lines.t(), lines)

    def state(self) -> list[Tensor]:
        """The sum."""
        return [self.total]

    def mean(self, scale: Tensor) -> "DenseCovariance":
        """`scale · Σ z zᵀ` in float64."""
        return DenseCovariance(self.total.double() * scale)


class DenseCovariance(Covariance):
    """B itself, `[d, d]`."""

    def __init__(self, matrix: Tensor) -> None:
        """Of `matrix [d, d]`, symmetric."""
        self.matrix = matrix

    def matmul(self, lines: Tensor) -> Tensor:
        """`B · X` for X `[d, c]`."""
        return self.matrix @ lines

    def columns(self, start: int, stop: int) -> Tensor:
        """A view of them."""
        return self.matrix[:, start:stop]

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Diagonal of `(B + λ I)⁻¹`, `[d]`, from the dense inverse."""
        size = self.matrix.shape[0]
        return torch.cholesky_inverse(damped_cholesky(self.matrix[None], size, damping)[0]).diagonal()

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """The b x b blocks on the diagonal."""
        return diagonal_blocks(self.matrix, block_size)
