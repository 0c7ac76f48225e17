"""The interface through which the tracer uses every estimator."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

_NOTHING = 1e-6


SCORING_COPIES = 6
"""The float64 copies of a gradient that scoring holds at most."""


@dataclass(frozen=True)
class EstimatorMemory:
    """Bytes that the estimator of one weight takes.

    Attributes:
        gradient: the mean gradient, or the squares.
        input_factor: A; weights that read the same inputs share one.
        output_factor: G.
        scoring: working memory while its blocks are scored, after the trace.
    """

    gradient: int
    input_factor: int = 0
    output_factor: int = 0
    scoring: int = 0


class Curvature(ABC):
    """Statistics of one weight `[m, n]` (m outputs, n inputs), gathered batch by batch.

    Estimators hold sums, so that the sums of several ranks add up to those of all their data.
    """

    @abstractmethod
    def update(self, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add a batch: `inputs [T, n]` and `output_gradients [T, m]`, one row per token.

        For a stack of experts, tokens are sorted by expert, and `offsets [E]` says where those of each end.
        """

    @property
    def is_waiting(self) -> bool:
        """Whether batches wait for `settle`."""
        return False

    def settle(self) -> None:
        """Finish updates that processes make together; all of them call this, with batches that wait or without."""
        return

    @abstractmethod
    def state(self) -> list[Tensor]:
        """Return every tensor held, in a fixed order and of fixed shapes; writing to one changes the estimator."""

    @abstractmethod
    def memory(self) -> EstimatorMemory:
        """Return the bytes that the estimator takes; on the meta device it tells them without taking them."""

    @abstractmethod
    def block_scores(self, block_size: int) -> Tensor:
        """Return the scores `[ceil(m/b), ceil(n/b)]`, float64, on the CPU; a better block has a higher score."""

    def combine(self, group: ProcessGroup) -> None:
        """Replace each sum by its total over all ranks of `group`."""
        for total in self.state():
            all_reduce(total, group=group)


def live_tokens(output_gradients: Tensor) -> Tensor:
    """Return `bool[T]`, true for the tokens of `output_gradients [T, m]` that carry loss or feed it.

    A token on which no loss depends (padding above all) has an output gradient of zero. It would add nothing to the
    gradients, but it would count in the mean and in the inputs' covariance. A gradient that is zero by cancellation,
    such as that of the first query, which sees one key alone, comes out as zero or as a rounding error, by chance.
    Therefore a token is live only if its largest entry exceeds a millionth of the batch's largest entry.
    """
    if output_gradients.shape[0] == 0:
        return output_gradients.new_empty(0, dtype=torch.bool)
    least, most = output_gradients.aminmax(dim=1)
    largest = torch.maximum(most, -least)
    return largest > _NOTHING * largest.amax()


def sum_tiles(matrix: Tensor, block_size: int) -> Tensor:
    """Return the sum of `matrix [m, n]` over each b x b block, `[ceil(m/b), ceil(n/b)]`."""
    for axis in (0, 1):
        matrix = sum_groups(matrix, block_size, axis)
    return matrix


def sum_groups(tensor: Tensor, block_size: int, axis: int = 0) -> Tensor:
    """Return the sums over groups of b neighbours along `axis`; the last group may be smaller."""
    size = tensor.shape[axis]
    groups = torch.arange(size, device=tensor.device) // block_size
    shape = list(tensor.shape)
    shape[axis] = -(-size // block_size)
    return tensor.new_zeros(shape).index_add_(axis, groups, tensor)
