"""What an estimator asks of a Kronecker factor, whether it is stored whole, as diagonal blocks or as a hierarchy."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


class Covariance(ABC):
    """`E[z zᵀ]` `[d, d]`, to be read."""

    @abstractmethod
    def matmul(self, lines: Tensor) -> Tensor:
        """`B · X` for X `[d, c]`."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Tensor:
        """Columns of B from `start` up to `stop`, `[d, stop - start]`."""

    @abstractmethod
    def inverse_diagonal(self, damping: float) -> Tensor:
        """Diagonal of `(B + λ I)⁻¹`, `[d]`; λ is `damping` times the mean diagonal of B, more if B needs it."""

    @abstractmethod
    def diagonal_blocks(self, block_size: int) -> Tensor:
        """The b x b blocks on the diagonal, `[ceil(d/b), b, b]`, zero beyond d."""


class Factor(ABC):
    """`Σ z zᵀ` over tokens z `[d]`, gathered batch by batch."""

    @abstractmethod
    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for Z `[T, d]`."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """All that is kept, in a fixed order and of fixed shapes; changing it in place changes the factor."""

    def copy(self) -> Self:
        """An independent factor of the same sum."""
        return copy.deepcopy(self)

    @abstractmethod
    def mean(self, scale: Tensor) -> Covariance:
        """`scale · Σ z zᵀ` in float64."""

    def combine(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks of `group`."""
        for total in self.state():
            all_reduce(total, group=group)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.state())


NewFactor = Callable[[int, torch.dtype, torch.device], Factor]
"""Makes a factor of d lines, zero, in a dtype on a device."""
