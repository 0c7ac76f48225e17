"""K-FAC: the curvature of a weight as a Kronecker product `G ⊗ A`, and the scores of its blocks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from sylva_compile.config import Score
from sylva_compile.curvature.base import SCORING_COPIES, Curvature, EstimatorMemory, live_tokens
from sylva_compile.curvature.factor import Covariance, NewFactor
from sylva_compile.curvature.gradient_sum import gradient_sum
from sylva_compile.curvature.greedy import choose_greedily
from sylva_compile.curvature.importance import GAIN_DAMPING, PAPER_DAMPING, gain_scores, importance, paper_scores
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.weight_spec import WeightSpec


def kronecker_scores(
    gradient: Tensor, a: Covariance, g: Covariance, score: Score, block_size: int, damping: float | None
) -> Tensor:
    """Return `paper_scores`, or the gains per token for "gain" and "greedy", `[ceil(m/b), ceil(n/b)]`, float64.

    Args:
        gradient: Γ `[m, n]`, float64.
        a: A `[n, n]`.
        g: G `[m, m]`.
        score: "gain", "greedy" or "paper".
        block_size: b.
        damping: λ as a fraction of a factor's mean diagonal; None: `PAPER_DAMPING` or `GAIN_DAMPING`.

    Raises:
        ArithmeticError: a factor is not finite, or indefinite under any damping.
    """
    if score != "paper":
        blocks = (a.diagonal_blocks(block_size), g.diagonal_blocks(block_size))
        return gain_scores(gradient, *blocks, GAIN_DAMPING if damping is None else damping)
    damping = PAPER_DAMPING if damping is None else damping
    outputs, inputs = importance(
        gradient,
        a.matmul(gradient.t()).t(),
        g.matmul(gradient),
        a.inverse_diagonal(damping),
        g.inverse_diagonal(damping),
    )
    return paper_scores(outputs, inputs, block_size)


class Kfac(Curvature):
    """`A = E[x xᵀ]`, `G = E[gy gyᵀ]` and the mean gradient Γ of one weight `[m, n]`.

    Memory: mn numbers for Γ, and the factors: `m² + n²` numbers if they are dense, `(m + n)·b` if they are diagonal
    blocks, `(m + n)·(s + 2rK)` if they are hierarchies with leaves of size s.
    """

    def __init__(
        self,
        spec: WeightSpec,
        *,
        new_factor: NewFactor,
        score: Score,
        damping: float | None,
        shared: InputFactors | None = None,
        gradient_device: torch.device | None = None,
        split_over: ProcessGroup | None = None,
    ) -> None:
        """Start with sums of zero on the weight's device, in float32 or wider.

        Args:
            spec: the weight; its name is the reader's in `shared`.
            new_factor: makes A and G.
            score: "gain", "greedy" or "paper".
            damping: λ as a fraction of a factor's mean diagonal; None: `PAPER_DAMPING` or `GAIN_DAMPING`.
            shared: keeps A for all weights that may share it; the caller calls its `end_batch` and `combine`. None: A
                belongs to this weight alone.
            gradient_device: where Γ is kept; None: the weight's device.
            split_over: processes of which each keeps some rows of Γ; None: this one keeps all.
        """
        dtype, device = spec.wide_dtype, spec.device
        self.score, self.damping, self.reader = score, damping, spec.name
        self._alone = shared is None
        self.inputs = InputFactors(new_factor) if shared is None else shared
        self.inputs.register(spec.name, spec.inputs, dtype, device)
        self.g = new_factor(spec.outputs, dtype, device)
        self.sum = gradient_sum(spec, gradient_device, split_over)
        self._numel = spec.outputs * spec.inputs
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add a batch, `inputs [T, n]` and `output_gradients [T, m]`; `live_tokens` says which tokens count.

        `offsets [1]`, where a weight has one expert alone, says nothing new.
        """
        live = live_tokens(output_gradients)
        self.inputs.show(self.reader, inputs, live)
        if self._alone:
            self.inputs.end_batch()
        x, gy = inputs, output_gradients
        if not bool(live.all()):
            x, gy = x[live], gy[live]
        self.g.update(gy.to(self.gradient.dtype))
        self.sum.add(x, gy)
        self.tokens += live.sum()

    @property
    def gradient(self) -> Tensor:
        """Γ as a sum over tokens: the part of it that this process keeps."""
        return self.sum.kept

    @property
    def is_waiting(self) -> bool:
        """Whether products wait for `settle`."""
        return self.sum.is_waiting

    def settle(self) -> None:
        """Add the products that wait for other processes."""
        self.sum.settle()

    def state(self) -> list[Tensor]:
        """Return Γ as a sum, the number of tokens and the state of G; `inputs` keeps A."""
        return [self.gradient, self.tokens, *self.g.state()]

    def memory(self) -> EstimatorMemory:
        """Return the bytes of Γ, A and G; scores are computed in float64, from copies of all three."""
        a, g = self.inputs.factor(self.reader).nbytes, self.g.nbytes
        scoring = 8 * SCORING_COPIES * self._numel + 4 * (a + g)
        return EstimatorMemory(self.gradient.nbytes, a, g, scoring)

    def combine(self, group: ProcessGroup) -> None:
        """Replace the sums by their totals over all ranks of `group`, except a shared A, which the caller combines."""
        self.sum.combine(group)
        all_reduce(self.tokens, group=group)
        self.g.combine(group)
        if self._alone:
            self.inputs.combine(group)

    def block_scores(self, block_size: int) -> Tensor:
        """Return `paper_scores`, or the gains for "gain" and "greedy", `[ceil(m/b), ceil(n/b)]`, on the CPU.

        `gain_scores` gives a gain per token, and weights see different numbers of live tokens: in a classifier's last
        layer only the token that the head reads has a gradient. The score is the gain times the number of live tokens,
        the decrease that the block could win on all of them, so that scores compare between weights.

        Raises:
            ArithmeticError: a factor is not finite, or indefinite under any damping.
        """
        found = kronecker_scores(*self.means(), self.score, block_size, self.damping)
        return (found if self.score == "paper" else self.tokens * found).cpu()

    def greedy_map(self, block_size: int, count: int, allowed: Tensor) -> Tensor:
        """Return the map of the `count` blocks that `choose_greedily` takes of the `allowed` ones.

        `allowed` and the map are `bool [ceil(m/b), ceil(n/b)]`.

        Raises:
            ArithmeticError: as `choose_greedily` does.
        """
        gradient, a, g = self.means()
        damping = GAIN_DAMPING if self.damping is None else self.damping
        return choose_greedily(gradient, a, g, block_size, damping, count, allowed)

    def means(self) -> tuple[Tensor, Covariance, Covariance]:
        """Return the means over tokens Γ `[m, n]`, A and G, in float64, on the weight's device."""
        scale = self.tokens.clamp(min=1).reciprocal()
        a, g = self.inputs.factor(self.reader).mean(scale), self.g.mean(scale)
        return self.sum.whole().to(scale.device).double() * scale, a, g
