"""`embed` and `unembed`: put trainable blocks into a model's frozen weights, and take them out again.

`sylva_compile.blocks.block_state` has the rule that keeps blocks and dense weights one value.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from sylva_compile._torch import forget_sharded, is_traceable_wrapper_subclass
from sylva_compile.blocks import registry
from sylva_compile.blocks.averaging import average_gradients
from sylva_compile.blocks.block_mask import SUFFIX, BlockMask, check_inside_experts
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embedded_module import EmbeddedModule, embedded_class
from sylva_compile.blocks.quantised_base import check_can_carry, quantised_base
from sylva_compile.blocks.quantised_module import quantised_class
from sylva_compile.blocks.quantised_state import QuantisedState
from sylva_compile.blocks.scope import input_axis, named_weights, owners_of, plain_name, unwrap
from sylva_compile.blocks.shards import is_sharded, reshard
from sylva_compile.blocks.unpacked import check_unpacked, keep_unpacked, let_pack
from sylva_compile.embedded.wrapping import check_not_wrapped
from sylva_compile.errors import EmbedError

_Owners = list[tuple[nn.Module, str]]


def block_states(model: nn.Module) -> dict[str, BlockState]:
    """Return every embedded weight of `model` by its full name; a shared one by the name that its mask has."""
    names: dict[BlockState, list[str]] = {}
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for attribute, state in module.__dict__.get("_sylva_states", {}).items():
            names.setdefault(state, []).append(plain_name(f"{prefix}.{attribute}" if prefix else attribute))
    return {state.name if state.name in found else found[0]: state for state, found in names.items()}


def embed(
    model: nn.Module,
    masks: Mapping[str, BlockMask],
    *,
    masks_config: Mapping[str, Any] | None = None,
    beside: bool = False,
) -> None:
    """Put trainable blocks into the weights named by `masks`; freeze those weights. Nothing else of the model changes.

    A weight that several modules share is embedded in all of them, with one set of blocks. Embedding the same masks
    again does nothing.

    Args:
        model: the model, or a wrapper of it.
        masks: weight name to blocks.
        masks_config: `Masks.config`, how the masks were made; `save_adapter` writes it.
        beside: whether other weights of the model may carry blocks already.

    Raises:
        EmbedError: the model carries other masks already, a module cannot carry blocks, two Parameters that are trained
            lie in the same memory, an evaluation has packed 4-bit weights for inference, DistributedDataParallel has
            wrapped the model, or the call is made under `torch.inference_mode()`. The model is as before then.
        ArgumentError: blocks would cross from one expert into the next; the model is as before.
    """
    wrapped, model = model, unwrap(model)
    present = block_states(model)
    if present and not beside:
        if {name: state.mask for name, state in present.items()} == dict(masks):
            return
        raise EmbedError(
            f"The model already carries {len(present)} embedded weights with other masks; call "
            "sylva_compile.unload_adapter(model) or merge_and_unload(model) before embedding these."
        )
    check_not_wrapped(wrapped, next(iter(masks), "The model"))
    if torch.is_inference_mode_enabled():
        raise EmbedError("Blocks made under torch.inference_mode() cannot be trained; embed masks outside of it.")
    reshard(model)
    parameters = named_weights(model)
    _check_memory(parameters, masks.keys() | present.keys())
    planned: list[tuple[BlockState, _Owners]] = []
    taken: dict[int, str] = {}
    for name, mask in masks.items():
        weight = parameters[name]
        if id(weight) in taken:
            raise EmbedError(f"{name} and {taken[id(weight)]} are one shared weight; give it one mask.")
        taken[id(weight)] = name
        check_inside_experts(mask.block_size, name, weight.shape)
        owners = _owners(model, name, weight)
        planned.append((_state(model, name, weight, mask, owners, dict(masks_config or {})), owners))
    check_unpacked(model)
    average_gradients(model, [state for state, _ in planned])
    _install_all(planned)
    keep_unpacked(model)
    for state, _ in planned:
        state.weight.requires_grad_(False)
        # An optimizer that still holds the weight would go on applying a gradient from before, or decay it.
        state.weight.grad = None
        registry.add(state)


def _check_memory(parameters: Mapping[str, nn.Parameter], carrying: Collection[str]) -> None:
    """Raise EmbedError if another Parameter lies in the memory of a weight that carries blocks, and is trained itself.

    Neither would see what training writes into the other. `carrying` are the names of the weights with blocks.
    """
    found: dict[int, str] = {}
    # Weights with blocks come first, and others that are trained meet them.
    for name in sorted(parameters, key=lambda name: name not in carrying):
        weight = parameters[name]
        if weight.device.type == "meta" or not weight.numel() or is_traceable_wrapper_subclass(weight):
            continue
        if name not in carrying and not weight.requires_grad:
            continue
        first = found.setdefault(weight.data_ptr(), name)
        if first in carrying and parameters[first] is not weight:
            raise EmbedError(
                f"{first} and {name} are two Parameters in the same memory; assign one Parameter to both modules."
            )


def unembed(model: nn.Module, *, restore: bool = False, names: Collection[str] | None = None) -> None:
    """Take the blocks out again: ordinary classes, ordinary weights, `requires_grad` as it was.

    Args:
        model: an embedded model; one that is not embedded is left alone.
        restore: put the base weights back bit for bit; otherwise the trained values stay in the dense weights.
        names: the weights to take blocks out of; all if left out.

    Raises:
        EmbedError: a class was made from an embedded one since, the base is not known, or `disable_adapter` shows it;
            nothing is changed then.
    """
    model = unwrap(model)
    states = {name: state for name, state in block_states(model).items() if names is None or name in names}
    for module in model.modules():
        if "_sylva_states" in module.__dict__ and "_sylva_base" not in vars(type(module)):
            raise EmbedError(
                f"{type(module).__name__} was made from an embedded class (a parametrization?); remove that first."
            )
    for state in states.values():
        state.check_enabled()
        state.sync()
        if restore:
            state.check_base_known()
    reshard(model)
    if sharded := [state.blocks for state in states.values() if is_sharded(state.blocks)]:
        forget_sharded(model, sharded)
    for state in states.values():
        if restore and not state.is_quantised:
            state.originals.restore(state.weight)
            state.follow_home()
        state.weight.requires_grad_(state.was_trainable)
        registry.remove(state)
    leaving = set(states.values())
    for module in list(model.modules()):
        if isinstance(module, EmbeddedModule):
            for attribute, state in tuple(module._sylva_states.items()):
                if state in leaving:
                    _uninstall(module, attribute)
    if not block_states(model):
        let_pack(model)


def _state(
    model: nn.Module, name: str, weight: nn.Parameter, mask: BlockMask, owners: _Owners, config: dict[str, Any]
) -> BlockState:
    base = quantised_base(model, weight)
    if base is None:
        return BlockState(name, weight, mask, input_axis(owners[0][0]), config)
    check_can_carry(model, {name: weight}, mask.block_size)
    return QuantisedState(name, weight, mask, base, config)


def _owners(model: nn.Module, name: str, weight: nn.Parameter) -> _Owners:
    """Return the modules that hold `weight`. Raises EmbedError where one has no room for the blocks."""
    owners = list(owners_of(model, weight))
    for module, attribute in owners:
        if hasattr(module, attribute + SUFFIX):
            raise EmbedError(f"{name}: its module has a {attribute + SUFFIX} of its own; leave it out of the scope.")
    return owners


def _install_all(planned: list[tuple[BlockState, _Owners]]) -> None:
    """Swap the classes of all modules, or of none where one refuses."""
    installed: _Owners = []
    try:
        for state, owners in planned:
            for module, attribute in owners:
                installed.append((module, attribute))
                _install(module, attribute, state)
    except Exception as error:
        for module, attribute in installed:
            _uninstall(module, attribute)
        module, attribute = installed[-1]
        raise EmbedError(
            f"A {type(module).__name__} cannot carry blocks in its {attribute} ({error}); leave it out of the scope."
        ) from error


def _install(module: nn.Module, attribute: str, state: BlockState) -> None:
    held = module.__dict__.get("_sylva_states", {})
    base: type = getattr(type(module), "_sylva_base", type(module))
    cls = quantised_class(base) if state.is_quantised else embedded_class(base, (*held, attribute))
    module.register_parameter(attribute + SUFFIX, state.blocks)
    module.__dict__["_sylva_states"] = {**held, attribute: state}
    module.__class__ = cls
    state.add_owner(module, attribute)


def _uninstall(module: nn.Module, attribute: str) -> None:
    """Undo `_install`, or the part of it that was done."""
    held = {name: state for name, state in module.__dict__.get("_sylva_states", {}).items() if name != attribute}
    base: type = getattr(type(module), "_sylva_base", type(module))
    module._parameters.pop(attribute + SUFFIX, None)
    if type(module) is not base:
        module.__class__ = embedded_class(base, tuple(held)) if held else base
    if held:
        module.__dict__["_sylva_states"] = held
    else:
        module.__dict__.pop("_sylva_states", None)
