"""Modules whose weight is pruned N:M: generated subclasses of Linear and Conv1D with a `forward` of their own.

The module's parameter is `weight_values`, the kept values alone. There is no `weight`: code that reads it would get a
weight without the second mask's input gradient, and gets an error instead. `state_dict()` has the dense weight, with
zeros, under its usual name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.blocks.shards import is_sharded
from sylva_compile.embedded.generated_class import empty_module, generated_class
from sylva_compile.embedded.wide import stay_wide
from sylva_compile.errors import EmbedError, MaskError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.nm.averaging import check_averaged, note_carried
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.linear import nm_linear
from sylva_compile.nm.low_rank import LEFT, RIGHT, LowRank

VALUES = "weight_values"
"""The name of the kept values, as a parameter of their module."""


class NMModule:
    """Mixin of every generated subclass. It comes first among the bases."""

    _nm_layout: NMLayout
    _nm_low_rank: LowRank | None
    _nm_base: type

    @property
    def weight(self) -> Tensor:
        """Raise EmbedError: a pruned module has no dense weight."""
        layout = self._nm_layout
        raise EmbedError(
            f"{layout.name} is pruned {layout.n}:{layout.m} and has no dense weight to read; leave it out of the scope "
            f"if its model reads it, or read model.state_dict() or {VALUES}."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x [..., in]`."""
        module: Any = self
        layout, low_rank = self._nm_layout, self._nm_low_rank
        values = module.weight_values
        if x.shape[-1] != layout.in_features:
            raise EmbedError(f"{layout.name} takes {layout.in_features} inputs and is given x of {tuple(x.shape)}.")
        if not torch.compiler.is_compiling():
            if is_sharded(values):
                raise split(layout)
            check_averaged(module._parameters.values())
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            if x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != layout.dtype:
            raise EmbedError(f"{layout.name} computes in {layout.dtype} and is given {x.dtype}; convert one of them.")
        if layout.frozen and torch.is_grad_enabled() and x.requires_grad:
            done = "frozen" if low_rank is None or low_rank.folded is None else "folded"
            raise EmbedError(f"{layout.name} is {done} for inference; run it under torch.no_grad().")
        if low_rank is not None and low_rank.folded is not None:
            both = nm_linear(x, values, low_rank.folded, (layout.n, layout.m))
            out = both[..., : layout.out_features]
            out = out + (both[..., layout.out_features :] @ module.weight_right.to(x.dtype)) / low_rank.rank
        else:
            second = layout.second if layout.double and not layout.frozen else None
            out = nm_linear(x, values, layout.codes, (layout.n, layout.m), second)
            if low_rank is not None:
                out = out + low_rank.output(x, module.weight_left, module.weight_right)
        return out if module.bias is None else out + module.bias.to(out.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        # `fully_shard` assigns its shards, and FullyShardedDataParallel marks modules before it flattens their
        # parameters; a model that trains and cannot be saved would come too late.
        if name == "_fsdp_use_orig_params" or (name in (VALUES, LEFT, RIGHT) and is_sharded(value)):
            raise split(self._nm_layout)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        layout, low_rank = self._nm_layout, self._nm_low_rank
        held = {name: module._parameters[name] for name in (VALUES, LEFT, RIGHT) if name in module._parameters}
        masters = {name: parameter.detach() for name, parameter in held.items()}
        # Values are wider than their weight, so they alone do not tell which dtype the weight gets.
        probe = fn(torch.empty(0, dtype=layout.dtype, device=masters[VALUES].device))
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        layout.dtype = probe.dtype
        wide = layout.dtype if layout.frozen else block_dtype(layout.dtype)
        for name, before in masters.items():
            after = module._parameters[name]
            note_carried(after, layout.name)
            stay_wide(after, before, wide)
        layout.to(module._parameters[VALUES].device)
        if low_rank is not None:
            low_rank.to(module._parameters[VALUES].device)
            low_rank.share_with(layout)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        module: Any = self
        destination[prefix + "weight"] = dense_weight(module)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination.pop(prefix + VALUES)
        if self._nm_low_rank is not None:
            destination.pop(prefix + LEFT, None)
            destination[prefix + LEFT] = dense_left(module)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        module: Any = self
        layout, low_rank = self._nm_layout, self._nm_low_rank
        given = dict(state_dict)
        places = None
        try:
            if low_rank is not None and low_rank.folded is not None and any(key.startswith(prefix) for key in given):
                raise MaskError(f"{layout.name} is folded for inference; load into a model before fold_low_rank.")
            if (weight := given.pop(prefix + "weight", None)) is not None:
                layout.check_fits(weight)
                given[prefix + VALUES] = layout.read(weight).to(module.weight_values.dtype)
            if low_rank is not None and (left := given.get(prefix + LEFT)) is not None:
                values, places = low_rank.read_left(left, layout.in_features)
                given[prefix + LEFT] = values.to(module.weight_left.dtype)
            if low_rank is not None and prefix + RIGHT in given:
                given[prefix + RIGHT] = given[prefix + RIGHT].to(module.weight_right.dtype)
        except MaskError as error:
            error_msgs.append(str(error))
            return
        missing: list[str] = []
        # Values are gathered from the dense weight in any case, so there is no tensor to assign.
        metadata = {**metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(given, prefix, metadata, strict, missing, unexpected_keys, error_msgs)  # type: ignore[misc]
        if prefix + VALUES in given and not module.weight_values.is_meta:
            # The second mask is that of the values. `NMMasks.load_state_dict`, called later, has one from further back.
            layout.change(module.weight_values)
        if low_rank is not None and weight is not None and prefix + RIGHT not in given:
            # The weight of a model without adapters is not to be read through this one's.
            with torch.no_grad():
                module.weight_right.zero_()
        missing_keys += [prefix + "weight" if key == prefix + VALUES else key for key in missing]
        if places is not None and low_rank is not None and low_rank.codes is not None:
            low_rank.codes.copy_(places)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        module: Any = self
        for name in (VALUES, LEFT, RIGHT):
            if name in module._parameters:
                note_carried(module._parameters[name], self._nm_layout.name)
        if self._nm_low_rank is not None:
            self._nm_low_rank.share_with(self._nm_layout)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name, so a pickle names the class it was made from.
        module: Any = self
        return _rebuild, (self._nm_base,), module.__getstate__()

    def _replicate_for_data_parallel(self) -> Any:
        raise EmbedError("Pruned weights do not work under DataParallel; use DistributedDataParallel.")

    def extra_repr(self) -> str:
        """Add the pattern to the module's own text."""
        text: str = super().extra_repr()  # type: ignore[misc]
        note = f"weight: {self._nm_layout.n}:{self._nm_layout.m}"
        rank = "" if self._nm_low_rank is None else f", adapter of rank {self._nm_low_rank.rank}"
        return ", ".join(filter(None, [text, note + rank]))


def split(layout: NMLayout) -> EmbedError:
    """Return the error for values that `fully_shard` or tensor parallelism splits."""
    return EmbedError(
        f"{layout.name} is pruned and cannot be split over processes; use DistributedDataParallel, or leave it out of "
        "the scope."
    )


def values_of(module: Any) -> Tensor:
    """Return the kept values of a pruned module, `[out, in // m * n]`, detached, without those of a folded adapter.

    Raises:
        EmbedError: `fully_shard` or tensor parallelism has split them.
    """
    values, layout = module._parameters[VALUES], module._nm_layout
    if is_sharded(values):
        raise split(layout)
    whole: Tensor = values.detach()[: layout.out_features]
    return whole


def dense_weight(module: Any) -> Tensor:
    """Return the dense weight of a pruned module as its base class stores it, without the adapter."""
    weight: Tensor = module._nm_layout.dense(values_of(module))
    return weight


def dense_left(module: Any) -> Tensor:
    """Return L of a pruned module's adapter as `[in, r]`."""
    low_rank: LowRank = module._nm_low_rank
    if low_rank.folded is None:
        return low_rank.dense_left(module._parameters[LEFT], low_rank.codes)
    out = module._nm_layout.out_features
    return low_rank.dense_left(module._parameters[VALUES].detach()[out:], low_rank.folded[out:])


def nm_class(base: type) -> type:
    """Return the subclass of `base` whose weight is pruned; made once and kept."""
    return generated_class(NMModule, base, "NM", lambda: {"_nm_base": base})


def _rebuild(base: type) -> nn.Module:
    """Make an empty module of the generated class; pickles name this function, and then set the module's state."""
    return empty_module(nm_class(base))
