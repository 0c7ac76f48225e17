"""The interface of a Kronecker factor, whether it is stored whole, as diagonal blocks or as a hierarchy."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


class Covariance(ABC):
    """The mean `B = E[z zᵀ]` `[d, d]` of a factor, read-only."""

    @abstractmethod
    def matmul(self, right: Tensor) -> Tensor:
        """Return `B · X` for X `[d, c]`."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns of B from `start` up to `stop`, `[d, stop - start]`."""

    @abstractmethod
    def inverse_diagonal(self, damping: float) -> Tensor:
        """Return the diagonal of `(B + λ I)⁻¹`, `[d]`.

        λ is `damping` times the mean diagonal of B, or more if B + λ I is not positive definite otherwise.
        """

    @abstractmethod
    def diagonal_blocks(self, block_size: int) -> Tensor:
        """Return the b x b blocks on the diagonal, `[ceil(d/b), b, b]`, zero beyond d."""


class Factor(ABC):
    """The sum `Σ z zᵀ` over tokens z `[d]`, gathered batch by batch."""

    @abstractmethod
    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for tokens Z `[T, d]`."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """Return every tensor kept, in a fixed order and of fixed shapes; writing to one changes the factor."""

    def copy(self) -> Self:
        """Return an independent factor with the same sum."""
        return copy.deepcopy(self)

    @abstractmethod
    def mean(self, scale: Tensor) -> Covariance:
        """Return `scale · Σ z zᵀ` in float64."""

    def combine(self, group: ProcessGroup) -> None:
        """Replace the sum by its total over all ranks of `group`."""
        for total in self.state():
            all_reduce(total, group=group)

    @property
    def nbytes(self) -> int:
        """Size of `state()` in bytes."""
        return sum(tensor.nbytes for tensor in self.state())


NewFactor = Callable[[int, torch.dtype, torch.device], Factor]
"""A function that makes a factor of zero, from its size d, its dtype and its device."""
