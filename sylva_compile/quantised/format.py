"""`Format`: what the library must know of a way to store weights; `QuantisedBase`: one weight in its format."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Format(Protocol):
    """A format of quantised weights; each is a `weight` of an `nn.Linear`, and its package is imported already.

    Attributes:
        name: how messages and adapters name it.
        keeps_input_dtype: whether the layer's output has the dtype of its input, whatever it computes in.
        knows_dtype: whether a packed weight tells which dtype it had before it was quantised.
    """

    name: str
    keeps_input_dtype: bool
    knows_dtype: bool

    def matches(self, weight: Tensor) -> bool:
        """Whether `weight` is stored in this format."""

    def refusal(self, weight: Tensor) -> str | None:
        """Return why `weight`, which matches, cannot be used now and what to do, or None."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return `(m, n)` of the weight that is dequantised."""

    def dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of what `dequantise` returns: that of the weight before it was quantised."""

    def input_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """Return the dtype in which the layer multiplies `x`, outside of autocast."""

    def value_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that trained values are rounded to, which the layer computes in."""

    def dequantise(self, module: Any) -> Tensor:
        """Return the weight of `module` as a new contiguous `[m, n]`; compilers can trace it."""

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """Return every tensor that the dequantised values depend on, by name."""

    def metadata(self, module: Any) -> dict[str, Any]:
        """Return every setting that the dequantised values depend on, by name."""


@dataclass(frozen=True)
class QuantisedBase:
    """A quantised weight: the module that holds it as `weight`, and its format."""

    module: nn.Module
    format: Format

    @property
    def weight(self) -> Tensor:
        """The packed weight, as the module holds it."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.format.shape(self.weight)

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype that trained values are rounded to."""
        return self.format.value_dtype(self.module)

    @property
    def kind(self) -> str:
        """The format and its settings in one line, equal for weights that dequantise equal bytes to equal values."""
        settings = (f"{key}={value}" for key, value in self.format.metadata(self.module).items())
        return " ".join([self.format.name, *settings])

    def tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by name."""
        return self.format.tensors(self.module)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight, dequantised, `[m, n]`."""
        return self.format.dequantise(self.module).detach()
