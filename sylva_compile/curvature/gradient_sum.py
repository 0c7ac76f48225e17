"""Sums of a weight's gradients over batches: whole on one process, or split by rows over several.

Processes that share the weights of a model could not keep the dense mean gradient of each weight either: it is as large
as the weight in float32. Each process then keeps the operands of a product until all have come so far. It multiplies
them, and a reduce-scatter gives it the total of its rows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import TraceError

# Version 2.13 of torch warns of the names that 2.11 has.
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


class GradientSum(ABC):
    """A sum over batches of gradients `[m, n]`, or of their squares.

    Attributes:
        kept: the part of it that this process keeps.
    """

    kept: Tensor

    @abstractmethod
    def add(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add the product of `inputs [T, n]` and `output_gradients [T, m]`, which nobody changes before `settle`."""

    @property
    def is_waiting(self) -> bool:
        """Whether products wait for `settle`."""
        return False

    def settle(self) -> None:
        """Add the products that wait, on all processes; each of them calls this, with products or without.

        Raises:
            TraceError: an operation in place changed an operand.
        """
        return

    @abstractmethod
    def combine(self, group: ProcessGroup) -> None:
        """Let the sum be that over all processes of `group`."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return the sum `[m, n]`; where it is split, all processes call this."""


def add_product(total: Tensor, inputs: Tensor, output_gradients: Tensor, *, squared: bool = False) -> None:
    """Add the product of `inputs [T, n]` and `output_gradients [T, m]`, or its square, to `total [m, n]`."""
    x, gy = inputs.to(total.dtype), output_gradients.to(total.dtype)
    if total.device == gy.device and not squared:
        total.addmm_(gy.t(), x)
    else:
        product = gy.t() @ x
        total += (product.square_() if squared else product).to(total.device)


class WholeSum(GradientSum):
    """The sum on one process."""

    def __init__(self, spec: WeightSpec, device: torch.device | None, *, squared: bool = False) -> None:
        """Start with a sum of zero, in float32 or wider, for the weight `spec`.

        Args:
            spec: the weight.
            device: where the sum is kept; None: the weight's device.
            squared: whether to sum squares.
        """
        self.kept = torch.zeros(spec.outputs, spec.inputs, dtype=spec.wide_dtype, device=device or spec.device)
        self._squared = squared

    def add(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add the product at once."""
        add_product(self.kept, inputs, output_gradients, squared=self._squared)

    def combine(self, group: ProcessGroup) -> None:
        """Replace the sum by its total over all processes of `group`."""
        distributed.all_reduce(self.kept, group=group)

    def whole(self) -> Tensor:
        """Return the sum `[m, n]`."""
        return self.kept


class RowSum(GradientSum):
    """The sum over processes, split into ranges of rows of equal size; the last ranges reach beyond the matrix."""

    def __init__(
        self, spec: WeightSpec, device: torch.device | None, group: ProcessGroup, *, squared: bool = False
    ) -> None:
        """Start with a sum of zero; arguments as for `WholeSum`, and `group`, the processes."""
        self._shape, self._group, self._device, self._squared = (spec.outputs, spec.inputs), group, spec.device, squared
        self._ranks = distributed.get_world_size(group)
        rows = -(-spec.outputs // self._ranks)
        self.kept = torch.zeros(rows, spec.inputs, dtype=spec.wide_dtype, device=device or spec.device)
        self._waiting: list[tuple[Tensor, Tensor, int, int]] = []

    def add(self, inputs: Tensor, output_gradients: Tensor) -> None:
        """Keep the operands until `settle`."""
        self._waiting.append((inputs, output_gradients, inputs._version, output_gradients._version))

    @property
    def is_waiting(self) -> bool:
        """Whether products wait for `settle`."""
        return bool(self._waiting)

    def settle(self) -> None:
        """Multiply the operands, and add the total of this process's rows."""
        (m, n), dtype = self._shape, self.kept.dtype
        padded = torch.zeros(len(self.kept) * self._ranks, n, dtype=dtype, device=self._device)
        waiting, self._waiting = self._waiting, []
        changed = False
        while waiting:
            x, gy, x_version, gy_version = waiting.pop(0)
            changed |= (x._version, gy._version) != (x_version, gy_version)
            if self._squared:
                padded[:m] += (gy.to(dtype).t() @ x.to(dtype)).square_()
            else:
                padded[:m].addmm_(gy.to(dtype).t(), x.to(dtype))
        mine = torch.empty(self.kept.shape, dtype=dtype, device=self._device)
        _reduce_scatter(mine, padded, group=self._group)
        self.kept += mine.to(self.kept.device)
        # Raised after the message, for which the other processes wait.
        if changed:
            raise TraceError("Inputs or gradients of a layer changed during the backward pass; use no in-place layers.")

    def combine(self, group: ProcessGroup) -> None:
        """Do nothing: the rows are totals already."""

    def whole(self) -> Tensor:
        """Return the sum `[m, n]`, gathered from all processes."""
        found = torch.empty(len(self.kept) * self._ranks, self._shape[1], dtype=self.kept.dtype, device=self._device)
        _all_gather(found, self.kept.to(self._device), group=self._group)
        return found[: self._shape[0]]


def gradient_sum(
    spec: WeightSpec, device: torch.device | None, group: ProcessGroup | None, *, squared: bool = False
) -> GradientSum:
    """Return a sum of zero: whole, or split over the processes of `group`; `device` keeps it."""
    if group is None:
        return WholeSum(spec, device, squared=squared)
    return RowSum(spec, device, group, squared=squared)
