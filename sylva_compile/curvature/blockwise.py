"""The diagonal blocks of the Kronecker factors: all that the block gain reads, at memory `(m + n)·b + mn` a weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.curvature.base import Curvature, live_tokens
from sylva_compile.curvature.importance import GAIN_DAMPING, gain_scores
from sylva_compile.kernels.blocks import block_dtype


class BlockKfac(Curvature):
    """The b x b diagonal blocks of A and G and the mean gradient Γ of one weight `[m, n]`.

    The gain of a block depends on the factors through these blocks alone, so the scores equal those of `DenseKfac`.
    """

    def __init__(self, weight: Tensor, outputs: int, inputs: int, *, block_size: int, damping: float | None) -> None:
        """Sums on the weight's device, in float32 or wider."""
        dtype, device = block_dtype(weight.dtype), weight.device
        self.block_size, self.damping = block_size, damping
        self.a = torch.zeros(-(-inputs // block_size), block_size, block_size, dtype=dtype, device=device)
        self.g = torch.zeros(-(-outputs // block_size), block_size, block_size, dtype=dtype, device=device)
        self.gradient = torch.zeros(outputs, inputs, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=weight.device)

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch; tokens whose output gradient is zero are left out."""
        gy = output_gradients.to(self.g.dtype)
        live = live_tokens(gy)
        x = inputs.to(self.a.dtype) * live
        self._add(self.a, x)
        self._add(self.g, gy)
        self.gradient.addmm_(gy.t(), x)
        self.tokens += live.sum()

    def _add(self, blocks: Tensor, lines: Tensor) -> None:
        count, b, _ = blocks.shape
        groups = F.pad(lines, (0, count * b - lines.shape[1])).unflatten(1, (count, b)).transpose(0, 1)
        blocks.baddbmm_(groups.transpose(1, 2), groups)

    def sums(self) -> list[Tensor]:
        """Blocks of A, blocks of G, Γ and the number of tokens, as sums."""
        return [self.a, self.g, self.gradient, self.tokens]

    def block_scores(self, block_size: int) -> Tensor:
        """The block gain; `block_size` must be the one that the factors were gathered for."""
        assert block_size == self.block_size
        tokens = self.tokens.clamp(min=1)
        a, g, gradient = (total.double() / tokens for total in (self.a, self.g, self.gradient))
        return gain_scores(gradient, a, g, GAIN_DAMPING if self.damping is None else self.damping).cpu()
