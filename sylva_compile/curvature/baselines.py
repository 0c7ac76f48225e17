"""First-order and data-free baselines for the second-order scores.

They are squared gradients, magnitudes, the magnitudes of a weight's low-rank part, and random scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.base import SCORING_COPIES, Curvature, EstimatorMemory, sum_tiles
from sylva_compile.curvature.gradient_sum import gradient_sum
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.kernels.blocks import grid_shape, matrix_shape


class SquaredGradient(Curvature):
    """The empirical Fisher's diagonal: squares of the batches' gradients, summed over batches and over each block."""

    def __init__(
        self, spec: WeightSpec, *, device: torch.device | None = None, split_over: ProcessGroup | None = None
    ) -> None:
        """Start with sums `[m, n]` of zero, in float32 or wider.

        Args:
            spec: the weight.
            device: where the sums are kept; None: the weight's device.
            split_over: processes of which each keeps some rows of the sums; None: this one keeps all.
        """
        self.sum = gradient_sum(spec, device, split_over, squared=True)
        self._numel = spec.outputs * spec.inputs

    def update(self, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add the square of the batch's gradient `[m, n]`, for `inputs [T, n]` and `output_gradients [T, m]`.

        `offsets [1]`, where a weight has one expert alone, says nothing new.
        """
        self.sum.add(inputs, output_gradients)

    @property
    def squares(self) -> Tensor:
        """The sums of squares: the part of them that this process keeps."""
        return self.sum.kept

    @property
    def is_waiting(self) -> bool:
        """Whether products wait for `settle`."""
        return self.sum.is_waiting

    def settle(self) -> None:
        """Add the squares of products that wait for other processes."""
        self.sum.settle()

    def combine(self, group: ProcessGroup) -> None:
        """Replace the sums by their totals over all ranks of `group`."""
        self.sum.combine(group)

    def state(self) -> list[Tensor]:
        """Return the sums of squares, `[m, n]`."""
        return [self.squares]

    def memory(self) -> EstimatorMemory:
        """Return the bytes of the squares, and of the six float64 copies that scoring holds at most."""
        return EstimatorMemory(gradient=self.squares.nbytes, scoring=8 * SCORING_COPIES * self._numel)

    def block_scores(self, block_size: int) -> Tensor:
        """Return the sum of squares in each block, `[ceil(m/b), ceil(n/b)]`."""
        return sum_tiles(self.sum.whole().double(), block_size).cpu()


def magnitude_scores(weight: Tensor, config: SylvaConfig) -> Tensor:
    """Return the sum of squared weights in each block of `weight [m, n]`, `[ceil(m/b), ceil(n/b)]`; needs no data."""
    return torch.cat([_magnitudes(matrix, config) for matrix in _matrices(weight)])


def lift_scores(weight: Tensor, config: SylvaConfig) -> Tensor:
    """Return the sum of squares in each block of the best approximation of `weight [m, n]` of rank `config.rank`.

    LIFT (Liu et al., ICML 2025) trains the entries that are largest in this approximation; here blocks take the place
    of entries, `[ceil(m/b), ceil(n/b)]`. Needs no data. The approximation comes from a randomised SVD on the CPU, whose
    directions are drawn from torch's global generator.
    """
    return torch.cat([_lifts(matrix, config) for matrix in _matrices(weight)])


def _matrices(weight: Tensor) -> tuple[Tensor, ...]:
    """Return `weight [m, n]`, or the weights of stacked experts `[E, m, n]`, one after the other."""
    return (weight,) if weight.dim() == 2 else weight.unbind()


def _magnitudes(matrix: Tensor, config: SylvaConfig) -> Tensor:
    return sum_tiles(matrix.detach().double().square(), config.block_size).cpu()


def _lifts(matrix: Tensor, config: SylvaConfig) -> Tensor:
    values = matrix.detach().cpu().to(torch.promote_types(matrix.dtype, torch.float32))
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
    return torch.rand(grid_shape(matrix_shape(weight.shape), config.block_size), dtype=torch.float64, device="cpu")


SCORES_WITHOUT_DATA: dict[str, Callable[[Tensor, SylvaConfig], Tensor]] = {
    "magnitude": magnitude_scores,
    "lift": lift_scores,
    "random": random_scores,
}
"""The methods that need no data: name to a function of a weight and the configuration."""
