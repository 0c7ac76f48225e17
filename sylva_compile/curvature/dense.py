"""Dense Kronecker factors, d² numbers each: exact K-FAC, the oracle for the factors that approximate it."""

import torch
from torch import Tensor

from sylva_compile.curvature.factor import Covariance, Factor
from sylva_compile.curvature.importance import damped_cholesky, diagonal_blocks


class DenseFactor(Factor):
    """`Σ z zᵀ` as a dense matrix `[d, d]`."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Start with a sum of zero, of d = `size`."""
        self.total = torch.zeros(size, size, dtype=dtype, device=device)

    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for tokens Z `[T, d]`."""
        tokens = tokens.to(self.total.dtype)
        self.total.addmm_(tokens.t(), tokens)

    def state(self) -> list[Tensor]:
        """Return the sum, `[d, d]`."""
        return [self.total]

    def mean(self, scale: Tensor) -> "DenseCovariance":
        """Return `scale · Σ z zᵀ` in float64."""
        return DenseCovariance(self.total.double() * scale)


class DenseCovariance(Covariance):
    """B as a dense matrix `[d, d]`."""

    def __init__(self, matrix: Tensor) -> None:
        """Keep `matrix [d, d]`, symmetric."""
        self.matrix = matrix

    def matmul(self, right: Tensor) -> Tensor:
        """Return `B · X` for X `[d, c]`."""
        return self.matrix @ right

    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns of B from `start` up to `stop`, `[d, stop - start]`, as a view."""
        return self.matrix[:, start:stop]

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Return the diagonal of `(B + λ I)⁻¹`, `[d]`, from the dense inverse; λ as for `damped_cholesky`."""
        size = self.matrix.shape[0]
        return torch.cholesky_inverse(damped_cholesky(self.matrix[None], size, damping)[0]).diagonal()

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """Return the b x b blocks on the diagonal, `[ceil(d/b), b, b]`, zero beyond d."""
        return diagonal_blocks(self.matrix, block_size)
