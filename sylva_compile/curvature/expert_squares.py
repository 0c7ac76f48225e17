"""Squared gradients of stacked experts."""

import torch
from torch import Tensor

from sylva_compile.curvature.base import Curvature, EstimatorMemory, sum_tiles
from sylva_compile.curvature.expert_tokens import expert_tokens
from sylva_compile.curvature.gradient_sum import add_product
from sylva_compile.curvature.weight_spec import WeightSpec


class ExpertSquares(Curvature):
    """The empirical Fisher's diagonal of E experts `[m, n]`: squares of the batches' gradients, summed over batches.

    The gradient of an expert is the sum over its own tokens. An expert with few tokens has a small one, so it needs no
    further damping; one without tokens scores zero.
    """

    def __init__(self, spec: WeightSpec, *, device: torch.device | None = None) -> None:
        """Start with sums `[E, m, n]` of zero, in float32 or wider.

        Args:
            spec: the stacked weight.
            device: where the sums are kept; None: the weight's device.
        """
        one = spec.per_expert
        shape = (spec.experts, one.outputs, one.inputs)
        self.squares = torch.zeros(shape, dtype=spec.wide_dtype, device=device or spec.device)

    def update(self, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add the squares of each expert's gradient, for `inputs [S, n]` and `output_gradients [S, m]`."""
        assert offsets is not None
        for expert, x, gy in expert_tokens(inputs, output_gradients, offsets).each():
            add_product(self.squares[expert], x, gy, squared=True)

    def state(self) -> list[Tensor]:
        """Return the sums of squares, `[E, m, n]`."""
        return [self.squares]

    def memory(self) -> EstimatorMemory:
        """Return the bytes of the squares, and of the float64 copies of one expert's while it is scored."""
        return EstimatorMemory(gradient=self.squares.nbytes, scoring=8 * 2 * self.squares[0].numel())

    def block_scores(self, block_size: int) -> Tensor:
        """Return the sum of squares in each block, `[E·ceil(m/b), ceil(n/b)]`, expert after expert."""
        return torch.cat([sum_tiles(one.double(), block_size).cpu() for one in self.squares])
