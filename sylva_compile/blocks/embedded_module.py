"""Modules whose weights carry blocks: generated subclasses that read, move, copy and save both as one value.

`embed` swaps a module's class for a subclass made here. Any code that reads `self.weight` then gets the dense weight,
whose gradient flows to the blocks: `nn.Linear`, the transposed Conv1D of GPT-2, a user's own module.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile._torch import is_fx_tracing, is_traceable_wrapper_subclass, mark_as_parameter, skip_code
from sylva_compile.blocks import registry
from sylva_compile.blocks.block_mask import SUFFIX
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import check_averaged
from sylva_compile.blocks.dense_view import DenseView
from sylva_compile.blocks.fully_sharded import follows
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.embedded.generated_class import empty_module, generated_class
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.block_norms import block_norms
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.gather_blocks import gather_blocks


class Embed(torch.autograd.Function):
    """The dense weight as it is; its gradient goes to the blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        blocks: Tensor,
        positions: Tensor,
        input_channels: Tensor,
        narrow_positions: Tensor,
        block_size: int,
        axis: int,
        gate: Tensor | None,
        scores: Tensor | None,
        sketch: bool,
    ) -> Tensor:
        """Return a view of `weight [m, n]` or `[E, m, n]`; nothing is copied or added.

        `scores`, where all blocks are to be scored, is a leaf that requires grad: its gradient are the scores.
        """
        ctx.save_for_backward(positions, input_channels, narrow_positions, gate)
        ctx.block_size, ctx.axis, ctx.scored, ctx.sketch = block_size, axis, scores is not None, sketch
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sample the dense gradient `[m, n]` at the blocks; the dense weight gets none."""
        *tensors, gate = ctx.saved_tensors
        blocks = gather_blocks(gradients[0], *tensors, ctx.block_size, ctx.axis, gate)
        scores = block_norms(gradients[0], ctx.block_size, ctx.sketch) if ctx.scored else None
        return None, blocks, None, None, None, None, None, None, scores, None


def _weight_property(attribute: str) -> property:
    def read(self: nn.Module) -> Tensor:
        weight, eager = self._parameters[attribute], not torch.compiler.is_compiling()
        assert weight is not None
        if not eager and not torch.is_grad_enabled():
            # A look at the blocks would make Dynamo guard on their number, and compile an evaluation for each mask.
            return weight
        blocks, state = self._parameters[attribute + SUFFIX], self.__dict__["_sylva_states"][attribute]
        assert blocks is not None
        training = torch.is_grad_enabled() and blocks.requires_grad
        if eager:
            if is_sharded(weight):
                # No pass reads shards: this is `fully_shard` itself, or somebody who looks at them.
                return weight
            # Without gradients, torch.func.functional_call may read another dense weight: no gradient can be lost.
            if blocks is not state.live_blocks or (training and weight is not state.live_weight):
                raise swapped(state)
            if training:
                check_averaged([state])
            state.sync()
        if not training:
            if registry.is_traced or (is_fx_tracing() if eager else not weight.requires_grad):
                return weight
            # Not the Parameter itself: somebody may have unfrozen it, and `weight.data = values` would pass us by.
            with torch.no_grad():
                view = weight.view_as(weight)
            if eager:
                mark_as_parameter(view)
                DenseView.of(view, state)
            return view
        at = state.layout
        # Uncompiled code reads positions alone. The other two tensors may be replaced while a step is under way, when a
        # compiled layer updates them; a checkpointed layer that runs again must save the tensors it saved before.
        tensors = (at.positions,) * 3 if eager else (at.positions, at.input_channels, at.narrow_positions)
        value: Tensor = Embed.apply(
            weight, blocks, *tensors, at.block_size, at.input_axis, at.gate, at.scores, at.sketch
        )
        if eager:
            # `model.get_parameter(name)` asks for a Parameter. To write, write the blocks, or this value under no_grad.
            mark_as_parameter(value)
            refuse_moves_before_backward(value, [state])
            DenseView.of(value, state)
        return value

    # Dynamo inlines this function into the frames that it compiles. Called from a frame that Dynamo skips
    # (`nn.Linear.forward` run by itself), it must not become a graph of its own with the dense gradient as boundary.
    skip_code(read.__code__)
    return property(read, doc=f"The dense `{attribute}`; its gradient flows to `{attribute}{SUFFIX}`.")


skip_code(Embed.forward.__code__)
skip_code(Embed.backward.__code__)


def swapped(state: BlockState) -> EmbedError:
    """Return the error for a training pass that reads another weight or other blocks than those of `state`."""
    return EmbedError(
        f"{state.name} or its blocks were swapped past the module (torch.func.functional_call, `_parameters[...]`), so "
        "the gradient would be lost; assign a Parameter to the module, or unload the adapter first."
    )


def refuse_moves_before_backward(output: Tensor, states: Iterable[BlockState]) -> None:
    """Let the backward pass through `output` raise EmbedError if it would give blocks of `states` wrong gradients.

    That is so where blocks have moved since, or another adapter was set: the gradients would belong to the places of
    before. And it is so where a pass ran inside of `disable_adapter`: they would be those of the base. Autograd would
    refuse most of this as well, in words about tensors.
    """
    if output.grad_fn is None:
        return
    then = [(weakref.ref(state), state.moves, state.disabled) for state in states]

    def check(gradients: Any) -> None:
        for ref, moves, disabled in then:
            state = ref()
            if state is not None and state.moves != moves:
                raise EmbedError(
                    f"The blocks of {state.name} have moved between a forward pass and its backward pass; move them, "
                    "or set another adapter, after optimizer.step()."
                )
            if state is not None and (disabled or state.disabled):
                raise EmbedError(
                    f"A backward pass to the blocks of {state.name} has its forward pass inside of disable_adapter or "
                    "runs there; run forward passes there under torch.no_grad(), and backward passes outside."
                )

    output.grad_fn.register_prehook(check)


skip_code(refuse_moves_before_backward.__code__)


class EmbeddedModule:
    """Mixin of every generated subclass. It comes first among the bases, so `super()` is the module's own class."""

    _sylva_states: dict[str, BlockState]
    _sylva_base: type

    def _sync(self) -> None:
        """Make blocks and dense weights equal before either is read."""
        for state in self._sylva_states.values():
            state.sync()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        self._sync()
        for state in self._sylva_states.values():
            state.check_enabled()
            # Both are moved; where they differ, one of them would be lost.
            if not is_sharded(state.weight):
                state.check_synced()
                state.settle_doubt()
        masters = {attribute: state.blocks.detach() for attribute, state in self._sylva_states.items()}
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for attribute, state in self._sylva_states.items():
            weight, blocks = module._parameters[attribute], module._parameters[attribute + SUFFIX]
            # Onto the meta device and off it, every owner of a shared weight would get Parameters of its own.
            for owner, name in state.owners():
                owner._parameters[name], owner._parameters[name + SUFFIX] = weight, blocks
            state.follow_move(weight, blocks, masters[attribute])
        registry.note_change()
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        states = self.__dict__.get("_sylva_states", {})
        state = states.get(name)
        of_blocks = states.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
        followed = state or of_blocks
        if followed is not None and follows(followed, state is not None, value):
            module: Any = self
            if module._parameters[name] is not value:
                module._parameters[name] = value
                registry.note_tensor(value, followed)
            return
        if state is None:
            super().__setattr__(name, value)
            return
        if value is state.weight or getattr(value, "_base", None) is state.weight:
            # The weight is tied to itself, through the view that reading it returned.
            return
        state.check_enabled()
        _check_assigned(state, value)
        old = state.weight.detach().to(dtype=value.dtype, copy=True)
        value.requires_grad_(False)
        # A shared weight has one set of blocks, so all modules that share it get the new one.
        for module, attribute in state.owners():
            module._parameters[attribute] = value
        state.weight = state.live_weight = value
        state.follow_assignment(old)
        registry.note_change()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        module: Any = self
        for attribute, own in self._sylva_states.items():
            own.add_owner(module, attribute)

    def __delattr__(self, name: str) -> None:
        state = self.__dict__.get("_sylva_states", {}).get(name)
        if state is not None:
            raise EmbedError(
                f"{state.name} carries blocks and cannot be deleted; use fully_shard in the place of "
                "FullyShardedDataParallel (FSDP2, not FSDP1), or unload the adapter first."
            )
        super().__delattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        raise EmbedError("Blocks do not work under DataParallel; use DistributedDataParallel, a process a device.")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for attribute in self._sylva_states:
            destination.pop(prefix + attribute + SUFFIX, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        self._sync()
        loaded = [state for attribute, state in self._sylva_states.items() if prefix + attribute in state_dict]
        for state in loaded:
            state.check_enabled()
        before = [(state.weight, state.weight.detach().clone()) for state in loaded]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)  # type: ignore[misc]
        for attribute in self._sylva_states:
            hidden = prefix + attribute + SUFFIX
            if hidden in missing_keys:
                missing_keys.remove(hidden)
        for state, (weight, old) in zip(loaded, before, strict=True):
            # With assign=True the weight is another one by now, and __setattr__ has followed it.
            if state.weight is weight:
                state.follow_assignment(old)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name, so a pickle names the class it was made from.
        module: Any = self
        self._sync()
        return rebuild, (self._sylva_base, tuple(self._sylva_states)), module.__getstate__()

    def extra_repr(self) -> str:
        """Add the number of trainable blocks to the module's own text."""
        text: str = super().extra_repr()  # type: ignore[misc]
        notes = (f"{attribute}: {state.mask.nnz} trainable blocks" for attribute, state in self._sylva_states.items())
        return ", ".join(filter(None, [text, *notes]))


def _check_assigned(state: BlockState, value: Any) -> None:
    """Raise EmbedError unless `value` can take the place of the dense weight of `state`."""
    found, wanted = tuple(getattr(value, "shape", ())), tuple(state.weight.shape)
    if not isinstance(value, nn.Parameter) or found != wanted:
        raise EmbedError(
            f"{state.name} carries blocks and takes a Parameter of shape {wanted} only; unload the adapter first."
        )
    if is_traceable_wrapper_subclass(value):
        raise EmbedError(
            f"{state.name} carries blocks and takes no {type(value.data).__name__}; unload the "
            "adapter before the weight is converted."
        )
    if value.device != state.weight.device or block_dtype(value.dtype) != state.blocks.dtype:
        raise EmbedError(
            f"{state.name} is {state.weight.dtype} on {state.weight.device} and is given {value.dtype} on "
            f"{value.device}; move the model with model.to(...), or the values before they are assigned."
        )


def embedded_class(base: type, attributes: tuple[str, ...]) -> type:
    """Return the subclass of `base` whose weights `attributes` carry blocks; made once and kept."""

    def members() -> dict[str, Any]:
        return {"_sylva_base": base, **{attribute: _weight_property(attribute) for attribute in attributes}}

    return generated_class(EmbeddedModule, base, "Embedded", members, attributes)


def rebuild(base: type, attributes: tuple[str, ...]) -> nn.Module:
    """Make an empty module of the embedded class; pickles name this function, and then set the module's state."""
    return empty_module(embedded_class(base, attributes))
