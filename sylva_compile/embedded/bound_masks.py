"""`BoundMasks`: the masks of a model's weights, bound to the model."""

import os
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor, nn

from sylva_compile.errors import MaskError
from sylva_compile.kernels.blocks import matrix_shape
from sylva_compile.quantised.registry import shape_of


class HasShape(Protocol):
    """The mask of one weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as its module stores it."""


M = TypeVar("M", bound=HasShape)


class BoundMasks(Mapping[str, M]):
    """A mapping from weight name to mask, usually bound to the model it was made for, which it does not keep alive.

    Attributes:
        config: how the masks were made; files keep it.
    """

    def __init__(self, masks: Mapping[str, M], model: nn.Module | None, config: Mapping[str, Any] | None) -> None:
        """Make masks from `masks`, by weight name; bind them to `model` if one is given."""
        self._masks, self.config = dict(masks), dict(config or {})
        self._model: weakref.ref[nn.Module] | None = None
        if model is not None:
            self.bind(model)

    def __getitem__(self, name: str) -> M:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the model, since another process has another one; `embed(model)` binds again."""
        return self.__dict__ | {"_model": None}

    @property
    def model(self) -> nn.Module | None:
        """The model that these masks are bound to, or None."""
        return self._model() if self._model is not None else None

    @abstractmethod
    def bind(self, model: nn.Module) -> None:
        """Bind to `model` after checking that every masked weight is there and can be embedded."""

    @abstractmethod
    def embed(self, model: nn.Module | None = None) -> nn.Module:
        """Embed the masked weights of `model` (the bound one if left out) in place; a second call changes nothing."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return the trained values of the bound model in the order of the masks; embed if need be."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as one file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read masks that `save` wrote; they are not bound to a model."""

    def check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        """Raise MaskError unless every masked weight is among `weights`, in its shape."""
        for name, mask in self.items():
            if name not in weights:
                raise MaskError(f"These masks name {name!r}, which this model lacks; make masks for this model.")
            found = shape_of(weights[name])
            # Stacked experts are a matrix to masks.
            if matrix_shape(found) != mask.shape:
                raise MaskError(f"{name} is {found} here and {mask.shape} in these masks; make masks for this model.")

    def _require_model(self) -> nn.Module:
        if (model := self.model) is None:
            raise MaskError("These masks are not bound to a living model; call masks.embed(model) with the model.")
        return model
