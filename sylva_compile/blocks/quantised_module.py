"""Modules whose quantised weight carries blocks: generated subclasses with a `forward` of their own.

`weight` stays the packed weight. There is no dense weight to read, and code that multiplies by the packed weight itself
would not see the blocks.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylva_compile.blocks import registry
from sylva_compile.blocks.block_mask import SUFFIX, BlockMask
from sylva_compile.blocks.ddp import check_averaged
from sylva_compile.blocks.embedded_module import EmbeddedModule, refuse_moves_before_backward, swapped
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.blocks.quantised_state import QuantisedState
from sylva_compile.embedded.generated_class import empty_module, generated_class
from sylva_compile.errors import EmbedError, MaskError
from sylva_compile.quantised.linear import EmbedQuantised, QuantisedLinear

BLOCKS = "weight" + SUFFIX
_PLACES, _LEFT_PLACES, _LEFT = "weight_places", "weight_left_places", "weight_left"
"""Entries of a state dict beside that of the blocks: where they are, and what they left behind once they moved."""


class QuantisedModule(EmbeddedModule):
    """Mixin of every generated subclass. It comes first among the bases."""

    _sylva_states: dict[str, QuantisedState]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x [..., n]`."""
        module: Any = self
        state = self._sylva_states["weight"]
        given, dtype = x.dtype, self._compute_dtype(x)
        x = x.to(dtype)
        bias = None if module.bias is None else module.bias.to(dtype)
        out = self._compiled(x, bias) if torch.compiler.is_compiling() else self._uncompiled(x, bias)
        return out.to(given) if state.format.keeps_input_dtype else out

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        return self._sylva_states["weight"].format.input_dtype(self, x)

    def _compiled(self, x: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self
        state = self._sylva_states["weight"]
        at = state.layout
        dense: Tensor = EmbedQuantised.apply(
            state.base_in_pass(module, x.dtype),
            module._parameters[BLOCKS],
            at.positions,
            at.input_channels,
            at.narrow_positions,
            at.block_size,
            at.gate,
            at.scores,
            at.sketch,
        )
        return F.linear(x, dense, bias)

    def _uncompiled(self, x: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self
        state = self._sylva_states["weight"]
        blocks = module._parameters[BLOCKS]
        if blocks is not state.live_blocks:
            raise swapped(state)
        if not torch.is_grad_enabled():
            return F.linear(x, state.weight_in_pass(module, x.dtype), bias)
        if blocks.requires_grad:
            check_averaged([state])
        state.sync()
        read = partial(state.weight_in_pass, module, x.dtype)
        out: Tensor = QuantisedLinear.apply(
            x, blocks, bias, read, state.layout.positions, state.layout.gate, state.layout.scores
        )
        refuse_moves_before_backward(out, [state])
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        module: Any = self
        if name in ("weight", BLOCKS) and name in module._parameters and value is not module._parameters[name]:
            raise EmbedError(
                f"{self._sylva_states['weight'].name} is quantised and carries blocks, and its tensors cannot be "
                "replaced (by fully_shard, say); unload the adapter first, or use DistributedDataParallel."
            )
        nn.Module.__setattr__(module, name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state = self._sylva_states["weight"]
        super(EmbeddedModule, self)._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        # In any case: blocks may move later, and values alone would be loaded to wherever the blocks are then.
        destination[prefix + _PLACES] = state.mask.positions.to(torch.int32)
        if state.moves:
            left, values = state.left_behind()
            destination[prefix + _LEFT_PLACES], destination[prefix + _LEFT] = left.to(torch.int32), values

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
        state = self._sylva_states["weight"]
        state.check_enabled()
        if (other := self._other_base(state_dict, prefix)) is not None:
            error_msgs.append(
                f"{state.name} is quantised and carries blocks, and {other} in the state dict is that of another base; "
                "load a state dict of this base, or unload the adapter and load the other model."
            )
            return
        # Copied in place in any case: an optimizer holds the blocks.
        metadata = {**metadata, "assign_to_params_buffers": False}
        places = {key: state_dict[prefix + key] for key in (_PLACES, _LEFT_PLACES, _LEFT) if prefix + key in state_dict}
        if prefix + BLOCKS in state_dict:
            try:
                self._go_to_saved(places)
            except (MaskError, KeyError) as error:
                error_msgs.append(f"{state.name}: the places of its blocks do not fit ({error}); embed the same masks.")
                return
        super(EmbeddedModule, self)._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for key in places:
            if prefix + key in unexpected_keys:
                unexpected_keys.remove(prefix + key)

    def _other_base(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Return the name of a packed tensor in `state_dict` that differs from the one here, or None.

        Loading would write the base, and bitsandbytes loads codes without their scales.
        """
        module: Any = self
        own: dict[str, Any] = {}
        super(EmbeddedModule, self)._save_to_state_dict(own, prefix, False)  # type: ignore[misc]
        others = {prefix + name for name in {*module._parameters, *module._buffers} - {"weight"}}
        for name in own.keys() & state_dict.keys() - others:
            held, given = own[name], state_dict[name]
            if held.is_meta or given.is_meta:
                continue
            if held.shape != given.shape or checksum(held) != checksum(given):
                return name
        return None

    def _go_to_saved(self, places: dict[str, Tensor]) -> None:
        state = self._sylva_states["weight"]
        mask = BlockMask(state.mask.shape, state.mask.block_size, places[_PLACES].to("cpu", torch.int64))
        if mask.nnz != state.mask.nnz:
            raise MaskError(f"{mask.nnz} blocks there and {state.mask.nnz} here")
        left = places.get(_LEFT_PLACES, mask.positions[:, :0])
        if mask == state.mask:
            state.take_trained(state.whole_blocks(), left, places.get(_LEFT))
            return
        state.take_trained(state.whole_blocks(), left, places.get(_LEFT), mask)
        # Compiled graphs read blocks by input channel, in a list that several weights may share.
        layouts = (other.layout for other in registry.live_states())
        update_input_channels(each for each in layouts if each.input_channels is state.layout.input_channels)

    def __reduce_ex__(self, protocol: Any) -> Any:
        module: Any = self
        return rebuild_quantised, (self._sylva_base,), module.__getstate__()


def quantised_class(base: type) -> type:
    """Return the subclass of `base` whose quantised weight carries blocks; made once and kept."""
    return generated_class(QuantisedModule, base, "Embedded", lambda: {"_sylva_base": base})


def rebuild_quantised(base: type) -> nn.Module:
    """Make an empty module of the generated class; pickles name this function, and then set the module's state."""
    return empty_module(quantised_class(base))
