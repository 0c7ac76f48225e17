"""`embed` and `unembed`: put the kept values in the place of a model's dense weights, and the other way round."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sylva_compile.blocks.scope import input_axis, is_conv1d, named_weights, owners_of, unwrap
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.embedded.wrapping import check_not_wrapped
from sylva_compile.errors import EmbedError, ScopeError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.nm.last_choice import forget_choices
from sylva_compile.kernels.nm_codes import bytes_of
from sylva_compile.nm.averaging import note_carried, note_replaced
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.low_rank import LEFT, RIGHT
from sylva_compile.nm.mask import NMMask
from sylva_compile.nm.module import VALUES, NMModule, dense_weight, nm_class
from sylva_compile.quantised.registry import format_of


def nm_modules(model: nn.Module) -> dict[str, Any]:
    """Return the pruned modules of `model` by the name of their weight; one of those that share a weight.

    Names are those in the masks. Where weights have the same one, since parts were pruned by themselves or copied, they
    are those of the weights in `model`.
    """
    found: dict[NMLayout, tuple[str, Any]] = {}
    for path, module in unwrap(model).named_modules():
        if isinstance(module, NMModule):
            found.setdefault(module._nm_layout, (f"{path}.weight" if path else "weight", module))
    named = {layout.name: module for layout, (_, module) in found.items()}
    return named if len(named) == len(found) else dict(found.values())


def sharing(model: nn.Module, layout: NMLayout) -> list[Any]:
    """Return all modules of `model` that share the weight of `layout`."""
    return [each for each in unwrap(model).modules() if isinstance(each, NMModule) and each._nm_layout is layout]


def check_can_carry(model: nn.Module, name: str, weight: Tensor) -> None:
    """Raise ScopeError or EmbedError unless every module that holds `weight` is an ordinary Linear or Conv1D."""
    owners = list(owners_of(model, weight))
    if format_of(weight) is not None:
        raise ScopeError(f"{name} is quantised, and pruning needs dense values; load the model unquantised.")
    if is_sharded(weight):
        raise ScopeError(f"{name} is split over processes, which pruned weights cannot be; leave it out of the scope.")
    for module, attribute in owners:
        if "_sylva_states" in module.__dict__:
            raise EmbedError(f"{name} carries blocks; call sylva_compile.merge_and_unload(model) before it is pruned.")
        forward = type(module).forward
        ordinary = forward is nn.Linear.forward or (is_conv1d(module) and "Conv1D.forward" in forward.__qualname__)
        # MultiheadAttention reads the weight of its projection, which it marks so, and calls no forward.
        ordinary &= not isinstance(module, NonDynamicallyQuantizableLinear)
        hooked = "forward" in module.__dict__ or hasattr(module, "parametrizations")
        if attribute != "weight" or not ordinary or hooked:
            raise ScopeError(
                f"{name} is the {attribute} of a {type(module).__name__}, which computes otherwise than a Linear or "
                "Conv1D; leave it out of the scope."
            )
    if len({input_axis(module) for module, _ in owners}) > 1:
        raise ScopeError(f"{name} is shared by a Linear and a Conv1D; leave it out of the scope.")


def embed(model: nn.Module, masks: Mapping[str, NMMask], *, double: bool) -> None:
    """Replace the weights named by `masks` by their kept values, as parameters `weight_values`. See `NMMasks.embed`."""
    wrapped, model = model, unwrap(model)
    check_not_wrapped(wrapped, next(iter(masks), "The model"))
    if torch.is_inference_mode_enabled():
        raise EmbedError("Weights pruned under torch.inference_mode() cannot be trained; embed masks outside of it.")
    parameters = named_weights(model)
    taken: dict[int, str] = {}
    for name in masks:
        check_can_carry(model, name, parameters[name])
        if (other := taken.setdefault(id(parameters[name]), name)) != name:
            raise EmbedError(f"{name} and {other} are one shared weight; give it one mask.")
    for name, mask in masks.items():
        weight = parameters[name]
        owners = [module for module, _ in owners_of(model, weight)]
        layout = _layout(name, weight, mask, double=double)
        values = layout.read(weight).to(block_dtype(weight.dtype))
        parameter = nn.Parameter(values.contiguous(), requires_grad=weight.requires_grad)
        layout.change(parameter)
        for module in owners:
            _install(module, layout, parameter)
        note_carried(parameter, name)
        note_replaced(weight, name)


def _layout(name: str, weight: Tensor, mask: NMMask, *, double: bool) -> NMLayout:
    out, size = mask.matrix_shape
    second = mask.codes.new_zeros((size, bytes_of(out // mask.m * mask.n, mask.m) if double else 0))
    layout = NMLayout(
        name=name,
        n=mask.n,
        m=mask.m,
        out_features=out,
        in_features=size,
        input_axis=mask.input_axis,
        double=double,
        dtype=weight.dtype,
        codes=mask.codes,  # Shared on the CPU: R never changes.
        second=second,
    )
    layout.to(weight.device)
    for places in (layout.codes, layout.second):
        forget_choices(places)
    return layout


def _install(module: nn.Module, layout: NMLayout, values: nn.Parameter) -> None:
    base = type(module)
    del module._parameters["weight"]
    module.__class__ = nm_class(base)
    # Last, so that an adapter stands right behind: `LowRankCallback` needs that order in optimizers.
    module.register_parameter(VALUES, values)
    module.__dict__["_nm_layout"], module.__dict__["_nm_low_rank"] = layout, None


def unembed(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Make ordinary modules of pruned ones; `weights` are other dense weights than theirs, by name."""
    for name, first in nm_modules(model).items():
        layout = first._nm_layout
        dense = dense_weight(first) if weights is None else weights[name]
        weight = nn.Parameter(dense, requires_grad=first._parameters[VALUES].requires_grad)
        for attribute in (VALUES, LEFT, RIGHT):
            if attribute in first._parameters:
                note_replaced(first._parameters[attribute], name)
        for module in sharing(model, layout):
            rest = {key: value for key, value in module._parameters.items() if key not in (VALUES, LEFT, RIGHT)}
            module._parameters.clear()
            del module.__dict__["_nm_layout"], module.__dict__["_nm_low_rank"]
            module.__class__ = module._nm_base
            # Its classes register the weight first, and state dicts have that order.
            module._parameters |= {"weight": weight, **rest}
