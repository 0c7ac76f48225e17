"""Exact K-FAC: dense Kronecker factors. Memory `n² + m² + mn` a weight; it stays in the house as the oracle."""

import torch
from torch import Tensor

from sylva_compile.curvature.base import Curvature, live_tokens
from sylva_compile.curvature.importance import (
    GAIN_DAMPING,
    PAPER_DAMPING,
    damped_cholesky,
    diagonal_blocks,
    gain_scores,
    importance,
    paper_scores,
)
from sylva_compile.kernels.blocks import block_dtype


class DenseKfac(Curvature):
    """Dense `A = E[x xᵀ]`, `G = E[gy gyᵀ]` and mean gradient `Γ` of one weight `[m, n]`."""

    def __init__(self, weight: Tensor, outputs: int, inputs: int, *, score: str, damping: float | None) -> None:
        """Sums on the weight's device, in float32 or wider; `score` is `"gain"` or `"paper"`."""
        dtype, device = block_dtype(weight.dtype), weight.device
        self.score, self.damping = score, damping
        self.a = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.g = torch.zeros(outputs, outputs, dtype=dtype, device=device)
        self.gradient = torch.zeros(outputs, inputs, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=weight.device)

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch; tokens whose output gradient is zero are left out."""
        gy = output_gradients.to(self.g.dtype)
        live = live_tokens(gy)
        x = inputs.to(self.a.dtype) * live
        self.a.addmm_(x.t(), x)
        self.g.addmm_(gy.t(), gy)
        self.gradient.addmm_(gy.t(), x)
        self.tokens += live.sum()

    def sums(self) -> list[Tensor]:
        """A, G, Γ and the number of tokens, as sums."""
        return [self.a, self.g, self.gradient, self.tokens]

    def block_scores(self, block_size: int) -> Tensor:
        """See `sylva_compile.curvature.importance`."""
        tokens = self.tokens.clamp(min=1)
        a, g, gradient = (total.double() / tokens for total in (self.a, self.g, self.gradient))
        if self.score == "gain":
            damping = GAIN_DAMPING if self.damping is None else self.damping
            blocks = (diagonal_blocks(a, block_size), diagonal_blocks(g, block_size))
            return gain_scores(gradient, *blocks, damping).cpu()
        damping = PAPER_DAMPING if self.damping is None else self.damping
        outputs, inputs = importance(
            gradient,
            gradient @ a,
            g @ gradient,
            inverse_diagonal(a, damping),
            inverse_diagonal(g, damping),
        )
        return paper_scores(outputs, inputs, block_size).cpu()


def inverse_diagonal(factor: Tensor, damping: float) -> Tensor:
    """`diag((B + λ I)⁻¹)` of a dense factor `[d, d]`, λ = `damping` times its mean diagonal, more if B needs it."""
    return torch.cholesky_inverse(damped_cholesky(factor[None], factor.shape[0], damping)[0]).diagonal()
