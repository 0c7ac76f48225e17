"""What the tracer asks of every estimator."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

_NOTHING = 1e-6


class Curvature(ABC):
    """Statistics of one weight `[m, n]` (m outputs, n inputs), gathered batch by batch.

    Estimators hold sums, so that the statistics of several ranks add up to those of all their data.
    """

    @abstractmethod
    def update(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch: `inputs [T, n]` and `output_gradients [T, m]`, token by token."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """All that is held, in a fixed order and of fixed shapes; changing it in place changes the estimator."""

    @abstractmethod
    def block_scores(self, block_size: int) -> Tensor:
        """Scores `[ceil(m/b), ceil(n/b)]`, float64, on the CPU; higher is worth more."""

    def combine(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks of `group`."""
        for total in self.state():
            all_reduce(total, group=group)


def live_tokens(output_gradients: Tensor) -> Tensor:
    """`bool[T]`: the tokens that carry loss or feed it.

    A token that no loss depends on (padding above all) has an output gradient of zero. It would add nothing to the
    gradients, but it would count in the mean and in the inputs' covariance. A gradient that is zero by cancellation,
    such as that of the first query, which sees one key alone, comes out as zero or as rounding, by chance: so the
    limit is a millionth of the batch's largest.
    """
    if output_gradients.shape[0] == 0:
        return output_gradients.new_empty(0, dtype=torch.bool)
    least, most = output_gradients.aminmax(dim=1)
    largest = torch.maximum(most, -least)
    return largest > _NOTHING * largest.amax()


def sum_tiles(matrix: Tensor, block_size: int) -> Tensor:
    """Sum `matrix [m, n]` over its blocks: `[ceil(m/b), ceil(n/b)]`."""
    for axis in (0, 1):
        matrix = sum_lines(matrix, block_size, axis)
    return matrix


def sum_lines(tensor: Tensor, block_size: int, axis: int = 0) -> Tensor:
    """Sum groups of b neighbours along `axis`; the last group may be short."""
    size = tensor.shape[axis]
    groups = torch.arange(size, device=tensor.device) // block_size
    shape = list(tensor.shape)
    shape[axis] = -(-size // block_size)
    return tensor.new_zeros(shape).index_add_(axis, groups, tensor)
