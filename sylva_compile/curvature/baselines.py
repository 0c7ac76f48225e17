"""First-order and data-free baselines for the second-order scores.

They are squared gradients, magnitudes, the magnitudes of a weight's low-rank part, and random scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.base import SCORING_COPIES, Curvature, EstimatorMemory, sum_tiles
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.kernels.blocks import grid_shape


class SquaredGradient(Curvature):
    """The empirical Fisher's diagonal: squares of the batches' gradients, summed over batches and over each block."""

    def __init__(self, spec: WeightSpec, *, device: torch.device | None = None) -> None:
        """Start with sums `[m, n]` of zero, in float32 or wider.

        Args:
            spec: the weight.
            device: where the sums are kept; None: the weight's device.
        """
        self.squares = torch.zeros(spec.outputs, spec.inputs, dtype=spec.wide_dtype, device=device or spec.device)

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add the square of the batch's gradient `[m, n]`, for `inputs [T, n]` and `output_gradients [T, m]`."""
        dtype = self.squares.dtype
        self.squares += (output_gradients.to(dtype).t() @ inputs.to(dtype)).square_().to(self.squares.device)

    def state(self) -> list[Tensor]:
        """Return the sums of squares, `[m, n]`."""
        return [self.squares]

    def memory(self) -> EstimatorMemory:
        """Return the bytes of the squares, and of the six float64 copies that scoring holds at most."""
        return EstimatorMemory(gradient=self.squares.nbytes, scoring=8 * SCORING_COPIES * self.squares.numel())

    def block_scores(self, block_size: int) -> Tensor:
        """Return the sum of squares in each block, `[ceil(m/b), ceil(n/b)]`."""
        return sum_tiles(self.squares.double(), block_size).cpu()


def magnitude_scores(weight: Tensor, config: SylvaConfig) -> Tensor:
    """Return the sum of squared weights in each block of `weight [m, n]`, `[ceil(m/b), ceil(n/b)]`; needs no data."""
    return sum_tiles(weight.detach().double().square(), config.block_size).cpu()


def lift_scores(weight: Tensor, config: SylvaConfig) -> Tensor:
    """Return the sum of squares in each block of the best approximation of `weight [m, n]` of rank `config.rank`.

    LIFT (Liu et al., ICML 2025) trains the entries that are largest in this approximation; here blocks take the place
    of entries, `[ceil(m/b), ceil(n/b)]`. Needs no data. The approximation comes from a randomised SVD on the CPU, whose
    directions are drawn from torch's global generator.
    """
    values = weight.detach().cpu().to(torch.promote_types(weight.dtype, torch.float32))
    rank = min(config.rank, *values.shape)
    u, s, v = torch.svd_lowrank(values, q=min(rank + _OVERSAMPLED, *values.shape), niter=_POWER_ITERATIONS)
    low_rank = (u[:, :rank] * s[:rank]) @ v[:, :rank].t()
    return sum_tiles(low_rank.double().square_(), config.block_size)


_OVERSAMPLED = 16
_POWER_ITERATIONS = 4


def random_scores(weight: Tensor, config: SylvaConfig) -> Tensor:
    """Return uniform random scores `[ceil(m/b), ceil(n/b)]` for the blocks of `weight [m, n]`; needs no data.

    They come from torch's global generator, so that `torch.manual_seed` determines the masks.
    """
    return torch.rand(grid_shape(weight.shape, config.block_size), dtype=torch.float64, device="cpu")


SCORES_WITHOUT_DATA: dict[str, Callable[[Tensor, SylvaConfig], Tensor]] = {
    "magnitude": magnitude_scores,
    "lift": lift_scores,
    "random": random_scores,
}
"""The methods that need no data: name to a function of a weight and the configuration."""
