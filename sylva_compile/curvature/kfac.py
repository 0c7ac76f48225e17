"""K-FAC: the curvature of a weight as a Kronecker product `G ⊗ A`, and the scores of its blocks."""

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from sylva_compile.curvature.base import Curvature, live_tokens
from sylva_compile.curvature.factor import Covariance, NewFactor
from sylva_compile.curvature.greedy import choose_greedily
from sylva_compile.curvature.importance import GAIN_DAMPING, PAPER_DAMPING, gain_scores, importance, paper_scores
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.kernels.blocks import block_dtype

Score = Literal["gain", "greedy", "paper"]


class Kfac(Curvature):
    """`A = E[x xᵀ]`, `G = E[gy gyᵀ]` and the mean gradient Γ of one weight `[m, n]`.

    Memory: mn numbers for Γ, and the factors: `m² + n²` numbers if they are dense, `(m + n)·b` if they are diagonal
    blocks, `(m + n)·(s + 2rK)` if they are hierarchies with leaves of s lines.
    """

    def __init__(
        self,
        weight: Tensor,
        outputs: int,
        inputs: int,
        *,
        new_factor: NewFactor,
        score: Score,
        damping: float | None,
        shared: InputFactors | None = None,
        reader: str = "",
        gradient_device: torch.device | None = None,
    ) -> None:
        """Sums on the weight's device, in float32 or wider.

        Args:
            weight: gives dtype and device.
            outputs: m.
            inputs: n.
            new_factor: makes A and G.
            score: "gain", "greedy" or "paper".
            damping: fraction of a factor's mean diagonal; None: the score's own.
            shared: where A is kept, for weights that may share it. The caller ends its batches and combines it over
                ranks. None: A belongs to this weight alone.
            reader: this weight's name in `shared`.
            gradient_device: where Γ is kept; None: beside the weight.
        """
        dtype, device = block_dtype(weight.dtype), weight.device
        self.score, self.damping, self.reader = score, damping, reader
        self._alone = shared is None
        self.inputs = InputFactors(new_factor) if shared is None else shared
        self.inputs.register(reader, inputs, dtype, device)
        self.g = new_factor(outputs, dtype, device)
        self.gradient = torch.zeros(outputs, inputs, dtype=dtype, device=gradient_device or device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch; tokens whose output gradient is zero are left out."""
        live = live_tokens(output_gradients)
        self.inputs.show(self.reader, inputs, live)
        if self._alone:
            self.inputs.end_batch()
        x, gy = inputs, output_gradients
        if not bool(live.all()):
            x, gy = x[live], gy[live]
        dtype = self.gradient.dtype
        x, gy = x.to(dtype), gy.to(dtype)
        self.g.update(gy)
        if self.gradient.device == gy.device:
            self.gradient.addmm_(gy.t(), x)
        else:
            self.gradient += (gy.t() @ x).to(self.gradient.device)
        self.tokens += live.sum()

    def state(self) -> list[Tensor]:
        """Γ, the number of tokens and G, as sums; A is kept by `inputs`."""
        return [self.gradient, self.tokens, *self.g.state()]

    def combine(self, group: ProcessGroup) -> None:
        """Add up the statistics of all ranks of `group`; a shared A is combined by who holds it."""
        for total in (self.gradient, self.tokens):
            all_reduce(total, group=group)
        self.g.combine(group)
        if self._alone:
            self.inputs.combine(group)

    def block_scores(self, block_size: int) -> Tensor:
        """See `sylva_compile.curvature.importance`; of "greedy", what each block could win alone.

        The gain is a token's, and weights see different numbers of tokens: of a classifier's last layer only the one
        that it reads has a gradient. Times the number of tokens it is what the block could win on all of them, which
        compares between weights.
        """
        gradient, a, g = self.means()
        if self.score != "paper":
            blocks = (a.diagonal_blocks(block_size), g.diagonal_blocks(block_size))
            return (self.tokens * gain_scores(gradient, *blocks, self._gain_damping())).cpu()
        damping = PAPER_DAMPING if self.damping is None else self.damping
        outputs, inputs = importance(
            gradient,
            a.matmul(gradient.t()).t(),
            g.matmul(gradient),
            a.inverse_diagonal(damping),
            g.inverse_diagonal(damping),
        )
        return paper_scores(outputs, inputs, block_size).cpu()

    def greedy_map(self, block_size: int, count: int, allowed: Tensor) -> Tensor:
        """See `sylva_compile.curvature.greedy`: a map with `count` of the `allowed` blocks."""
        gradient, a, g = self.means()
        return choose_greedily(gradient, a, g, block_size, self._gain_damping(), count, allowed)

    def _gain_damping(self) -> float:
        return GAIN_DAMPING if self.damping is None else self.damping

    def means(self) -> tuple[Tensor, Covariance, Covariance]:
        """Γ, A and G in float64, beside the weight."""
        scale = self.tokens.clamp(min=1).reciprocal()
        a, g = self.inputs.factor(self.reader).mean(scale), self.g.mean(scale)
        return self.gradient.to(scale.device).double() * scale, a, g
