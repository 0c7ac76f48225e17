"""Probes: scalars that a trace differentiates in place of weights which `fully_shard` has split.

A gathered weight lives as long as a pass, in memory that changes hands. If it required grad, FSDP would reduce its
dense gradient. So a trace leaves it frozen, and swaps the classes of modules, as embedding does: their weight reads as
a view that depends on a probe as well, a scalar which requires grad and stays in its place. The probe's gradient stands
in graphs where that of the weight would be, and a pass finds the operands there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile._torch import skip_code
from sylva_compile.blocks.scope import owners_of
from sylva_compile.blocks.shards import compute_device, is_sharded
from sylva_compile.errors import TraceError
from sylva_compile.kernels.probe import probe

SUFFIX = "_probe"
"""A probe is a parameter of its weight's modules, under the weight's attribute and this suffix, during a trace."""


class Probe(torch.autograd.Function):
    """The gathered weight as it is; its gradient goes to the probe."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, leaf: Tensor) -> Tensor:
        """Return a view of `weight [m, n]`; nothing is copied."""
        ctx.save_for_backward(leaf)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """Mark the dense gradient `[m, n]`; the weight gets none."""
        (leaf,) = ctx.saved_tensors
        return None, probe(gradients[0], leaf)


def _weight_property(attribute: str) -> property:
    def read(self: nn.Module) -> Any:
        weight = self._parameters[attribute]
        assert weight is not None
        # fully_shard itself reads the DTensor between two passes.
        if not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and is_sharded(weight)):
            return weight
        return Probe.apply(weight, self._parameters[attribute + SUFFIX])

    # As for embedded weights: a graph of its own would have the dense gradient as its boundary.
    skip_code(read.__code__)
    return property(read)


skip_code(Probe.forward.__code__)
skip_code(Probe.backward.__code__)


@contextmanager
def probes(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Let modules of `model` read `weights` through probes inside the block, and yield the probes by name.

    Raises:
        TraceError: a module has a class that cannot be swapped, or a parameter with the name of a probe.
    """
    leaves = {name: nn.Parameter(torch.zeros((), device=compute_device(weight))) for name, weight in weights.items()}
    read: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for name, weight in weights.items():
        for module, attribute in owners_of(model, weight):
            if attribute + SUFFIX in module._parameters:
                raise TraceError(f"A module has a parameter {attribute + SUFFIX}, which a trace needs; rename it.")
            read.setdefault(module, {})[attribute] = leaves[name]
    classes = {module: type(module) for module in read}
    try:
        for module, own in read.items():
            for attribute, leaf in own.items():
                module._parameters[attribute + SUFFIX] = leaf
            module.__class__ = _probed_class(classes[module], tuple(own))
        yield leaves
    finally:
        for module, own in read.items():
            module.__class__ = classes[module]
            for attribute in own:
                module._parameters.pop(attribute + SUFFIX, None)


_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def _probed_class(base: type, attributes: tuple[str, ...]) -> type:
    """Return the subclass of `base` that reads the weights `attributes` through probes; made once and kept."""
    key = (base, attributes)
    if key not in _classes:
        members: dict[str, Any] = {attribute: _weight_property(attribute) for attribute in attributes}
        members["__module__"] = __name__
        _classes[key] = type(f"Probed{base.__name__}", (base,), members)
    return _classes[key]
