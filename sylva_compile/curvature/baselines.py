"""The scores that second order has to beat: squared gradients, magnitudes, chance."""

import torch
from torch import Tensor

from sylva_compile.curvature.base import Curvature, sum_tiles
from sylva_compile.kernels.blocks import block_dtype, grid_shape


class SquaredGradient(Curvature):
    """The empirical Fisher's diagonal: squares of the batches' gradients, summed over batches and over each block."""

    def __init__(self, weight: Tensor, outputs: int, inputs: int, *, device: torch.device | None = None) -> None:
        """Sums `[m, n]` on `device`, the weight's if left out, in float32 or wider."""
        dtype = block_dtype(weight.dtype)
        self.squares = torch.zeros(outputs, inputs, dtype=dtype, device=device or weight.device)

    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch: one gradient `[m, n]`, squared."""
        dtype = self.squares.dtype
        self.squares += (output_gradients.to(dtype).t() @ inputs.to(dtype)).square_().to(self.squares.device)

    def state(self) -> list[Tensor]:
        """The squares."""
        return [self.squares]

    def block_scores(self, block_size: int) -> Tensor:
        """Sum of squares in each block."""
        return sum_tiles(self.squares.double(), block_size).cpu()


def magnitude_scores(weight: Tensor, block_size: int) -> Tensor:
    """Sum of squared weights in each block of `weight [m, n]`; needs no data."""
    return sum_tiles(weight.detach().double().square(), block_size).cpu()


def random_scores(weight: Tensor, block_size: int) -> Tensor:
    """Uniform scores from torch's global generator: `torch.manual_seed` chooses the masks; needs no data."""
    return torch.rand(grid_shape(weight.shape, block_size), dtype=torch.float64, device="cpu")
