"""K-FAC of stacked experts: one factor of the inputs for all of them, and a factor of the outputs for each.

Tokens t of a layer are routed to experts, each to one or several. An expert e sees its own T_e tokens, all of them
together T = Σ T_e. With inputs x and output gradients gy, and blocks of size b,

    A   = Σ x xᵀ / T                over the tokens of all experts; one that reached two experts counts twice
    G_e = Σ gy gyᵀ / T_e            over the tokens of e
    Γ_e = Σ gy xᵀ / (T_e + b)       over the tokens of e

An expert with few tokens has a mean gradient that is mostly noise, so Γ_e counts b more tokens without any gradient: as
many as a b x b block of G_e needs to have full rank. The scores of a block count what it brings on all tokens of its
expert, so that experts compare with each other and with other weights:

    "gain", "greedy"    T_e · gain(Γ_e, A, G_e)
    "paper"             (T_e / T)² · paper(Γ_e, A, G_e): both importances, times the expert's share of the tokens

On pure noise both stay at or below the score that many tokens give. An expert without tokens scores zero.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from sylva_compile.config import ExpertBudget, Score
from sylva_compile.curvature.base import SCORING_COPIES, Curvature, EstimatorMemory
from sylva_compile.curvature.expert_tokens import expert_tokens
from sylva_compile.curvature.factor import Covariance, NewFactor
from sylva_compile.curvature.gradient_sum import add_product
from sylva_compile.curvature.greedy import Pursuit, Whitened
from sylva_compile.curvature.importance import GAIN_DAMPING
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import kronecker_scores
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.kernels.blocks import grid_shape


class ExpertKfac(Curvature):
    """A, and G_e and Γ_e of each of E experts `[m, n]`.

    Memory: Emn numbers for the gradients, one factor A, and E factors G; see `Kfac`.
    """

    def __init__(
        self,
        spec: WeightSpec,
        *,
        new_factor: NewFactor,
        score: Score,
        damping: float | None,
        shared: InputFactors,
        gradient_device: torch.device | None = None,
        budget: ExpertBudget = "layer",
    ) -> None:
        """Start with sums of zero on the weight's device, in float32 or wider.

        Args:
            spec: the stacked weight; its name is the reader's in `shared`.
            new_factor: makes A and every G.
            score: "gain", "greedy" or "paper".
            damping: λ as a fraction of a factor's mean diagonal; None: `PAPER_DAMPING` or `GAIN_DAMPING`.
            shared: keeps A; the caller calls its `end_batch` and `combine`.
            gradient_device: where the gradients are kept; None: the weight's device.
            budget: "layer": the greedy choice goes over all experts together; "expert": each gets the same number.
        """
        one, dtype, device = spec.per_expert, spec.wide_dtype, spec.device
        self.score, self.damping, self.budget, self.reader = score, damping, budget, spec.name
        self.inputs = shared
        self.inputs.register(spec.name, one.inputs, dtype, device)
        self.g = [new_factor(one.outputs, dtype, device) for _ in range(spec.experts)]
        shape = (spec.experts, one.outputs, one.inputs)
        self.gradient = torch.zeros(shape, dtype=dtype, device=gradient_device or device)
        self.tokens = torch.zeros(spec.experts, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add a batch, `inputs [S, n]` and `output_gradients [S, m]`, sorted by expert; `offsets [E]` says where."""
        assert offsets is not None
        found = expert_tokens(inputs, output_gradients, offsets)
        self.inputs.show(self.reader, inputs, found.live)
        for expert, x, gy in found.each():
            self.g[expert].update(gy.to(self.gradient.dtype))
            add_product(self.gradient[expert], x, gy)
        self.tokens += found.counts

    def state(self) -> list[Tensor]:
        """Return the gradients as sums, the numbers of tokens and the states of all G; `inputs` keeps A."""
        return [self.gradient, self.tokens, *(tensor for factor in self.g for tensor in factor.state())]

    def memory(self) -> EstimatorMemory:
        """Return the bytes of the gradients, A and all G.

        Scores are computed in float64, expert by expert. The greedy choice keeps a copy of every expert's gradient.
        """
        a, g = self.inputs.factor(self.reader).nbytes, sum(factor.nbytes for factor in self.g)
        one = self.gradient[0].numel()
        greedy = self.score == "greedy"
        copies = SCORING_COPIES + (len(self.g) if greedy else 0)
        scoring = 8 * copies * one + 4 * (a + (g if greedy else g // len(self.g)))
        return EstimatorMemory(self.gradient.nbytes, a, g, scoring)

    def combine(self, group: ProcessGroup) -> None:
        """Replace the sums by their totals over all ranks of `group`, except A, which the caller combines."""
        all_reduce(self.gradient, group=group)
        all_reduce(self.tokens, group=group)
        for factor in self.g:
            factor.combine(group)

    def block_scores(self, block_size: int) -> Tensor:
        """Return the scores above, `[E·ceil(m/b), ceil(n/b)]`, expert after expert, on the CPU.

        Raises:
            ArithmeticError: a factor is not finite, or indefinite under any damping.
        """
        tokens = self.tokens.tolist()
        grid = grid_shape(self.gradient.shape[1:], block_size)
        scores = torch.zeros(len(tokens), *grid, dtype=torch.float64, device="cpu")
        a = self._input_mean()
        for expert, count in enumerate(tokens):
            if count:
                means = self._gradient_mean(expert, block_size), a, self._output_mean(expert)
                found = kronecker_scores(*means, self.score, block_size, self.damping)
                scores[expert] = (count / sum(tokens)) ** 2 * found if self.score == "paper" else count * found
        return scores.flatten(0, 1)

    def greedy_map(self, block_size: int, count: int, allowed: Tensor) -> Tensor:
        """Return the map of the `count` blocks that the greedy choice takes of the `allowed` ones.

        Experts do not act on each other in the quadratic model. So each has a choice of its own, and the next block is
        that of the expert whose best one gains most.

        Args:
            block_size: b.
            count: a multiple of E if each expert gets the same number.
            allowed: `bool [E·ceil(m/b), ceil(n/b)]`.

        Returns:
            `bool [E·ceil(m/b), ceil(n/b)]` on the CPU.

        Raises:
            ArithmeticError: as `choose_greedily` does.
        """
        experts, m, n = self.gradient.shape
        damping = GAIN_DAMPING if self.damping is None else self.damping
        tokens = self.tokens.tolist()
        mb, nb = grid_shape((m, n), block_size)
        squares = torch.empty(mb * block_size, nb * block_size, dtype=torch.float64, device=self.tokens.device)
        inputs = Whitened(self._input_mean(), n, block_size, damping) if any(tokens) else None
        allowed = allowed.unflatten(0, (experts, mb)).cpu()
        chosen = torch.zeros_like(allowed)
        together = [range(experts)] if self.budget == "layer" else [range(at, at + 1) for at in range(experts)]
        for group in together:
            pursuits: dict[int, Pursuit] = {}
            for expert in group:
                if tokens[expert] and inputs is not None:
                    outputs = Whitened(self._output_mean(expert), m, block_size, damping)
                    gradient = self._gradient_mean(expert, block_size)
                    pursuits[expert] = Pursuit(gradient, outputs, inputs, allowed[expert], squares)
            left = count // len(together) - _take_best(pursuits, tokens, count // len(together))
            for expert, pursuit in pursuits.items():
                chosen[expert] = pursuit.chosen()
            if left:
                # Experts without tokens gain nothing: the first of their blocks, as for equal scores.
                own = slice(group.start, group.stop)
                free = (allowed[own] & ~chosen[own]).flatten().nonzero()[:left, 0]
                chosen[own].view(-1)[free] = True
        return chosen.flatten(0, 1)

    def _input_mean(self) -> Covariance:
        return self.inputs.factor(self.reader).mean(self.tokens.sum().clamp(min=1).reciprocal())

    def _output_mean(self, expert: int) -> Covariance:
        return self.g[expert].mean(self.tokens[expert].reciprocal())

    def _gradient_mean(self, expert: int, block_size: int) -> Tensor:
        """Return Γ_e `[m, n]`, in float64, on the weight's device."""
        return self.gradient[expert].to(self.tokens.device).double() / (self.tokens[expert] + block_size)


def _take_best(pursuits: Mapping[int, Pursuit], tokens: Sequence[float], count: int) -> int:
    """Take `count` blocks, or all there are: each time the one that gains most on all tokens of its expert.

    Returns:
        The number of blocks taken.
    """
    for taken in range(count):
        gains = {expert: tokens[expert] * pursuit.gain() for expert, pursuit in pursuits.items()}
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] == -math.inf:
            return taken
        pursuits[best].take()
    return count
