"""Probes of quantised weights: parameters of no memory that a trace differentiates in their place.

A packed weight cannot require grad. So a trace swaps the classes of its modules: they multiply by the dequantised
weight, through a Function that gives its gradient to a leaf `[m, n]` of one element. That leaf stands in graphs for the
weight, and everything of a trace of dense weights works with it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylva_compile.blocks.quantised_base import quantised_base
from sylva_compile.blocks.scope import owners_of
from sylva_compile.embedded.generated_class import generated_class
from sylva_compile.errors import TraceError
from sylva_compile.quantised.format import Format

SUFFIX = "_probe"


class QuantisedProbe(torch.autograd.Function):
    """The dequantised weight as it is; its gradient goes to the probe."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, leaf: Tensor) -> Tensor:
        """Return a view of `dense [m, n]`."""
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """Give the gradient `[m, n]` to the probe; a pass takes its operands and computes none."""
        return None, gradients[0]


class _ProbedModule:
    """Mixin of generated subclasses whose quantised weight is observed."""

    _sylva_probed: Format

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x [..., n]`."""
        module: Any = self
        kind = self._sylva_probed
        given, dtype = x.dtype, kind.input_dtype(module, x)
        x = x.to(dtype)
        dense = kind.dequantise(module).detach().to(dtype)
        if torch.is_grad_enabled():
            dense = QuantisedProbe.apply(dense, module._parameters["weight" + SUFFIX])
        out = F.linear(x, dense, None if module.bias is None else module.bias.to(dtype))
        return out.to(given) if kind.keeps_input_dtype else out


@contextmanager
def quantised_probes(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Let quantised ones of `weights` be observed through probes inside the block.

    Yields `weights`, by name, with the probe in the place of each quantised one.

    Raises:
        TraceError: a module has a parameter with the name of a probe.
    """
    found = dict(weights)
    classes: dict[nn.Module, type] = {}
    try:
        for name, weight in weights.items():
            base = quantised_base(model, weight)
            if base is None:
                continue
            found[name] = _probe(base.shape, base.format.dtype(weight), weight.device)
            for module, _ in list(owners_of(model, weight)):
                if hasattr(module, "weight" + SUFFIX):
                    raise TraceError(f"A module has a parameter weight{SUFFIX}, which a trace needs; rename it.")
                classes[module] = type(module)
                module._parameters["weight" + SUFFIX] = found[name]
                module.__dict__["_sylva_probed"] = base.format
                module.__class__ = generated_class(_ProbedModule, classes[module], "Probed")
        yield found
    finally:
        for module, kind in classes.items():
            module.__class__ = kind
            module._parameters.pop("weight" + SUFFIX, None)
            module.__dict__.pop("_sylva_probed", None)


def _probe(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, dtype=dtype, device=device).expand(shape))
