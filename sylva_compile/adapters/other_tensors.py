"""The tensors of a model beside its blocks: those that an adapter stores whole, and those that stay frozen."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile._torch import is_traceable_wrapper_subclass, non_persistent_buffers
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.quantised_base import quantised_base
from sylva_compile.blocks.scope import named_weights, plain_name, unwrap
from sylva_compile.blocks.shards import put
from sylva_compile.blocks.shards import whole as values_of
from sylva_compile.errors import AdapterError
from sylva_compile.quantised.registry import format_of

log = logging.getLogger(__name__)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and every buffer of a state dict by its plain name; shared ones under each name."""
    found: dict[str, Tensor] = dict(named_weights(model))
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in non_persistent_buffers(module):
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def other_names(weights: Mapping[str, Tensor], name: str) -> list[str]:
    """Return the other names of the weight `name` among `weights`: those under which modules share it."""
    return sorted(other for other, weight in weights.items() if weight is weights[name] and other != name)


def check_shared(name: str, entry: Mapping[str, Any], weights: Mapping[str, Tensor], source: object) -> None:
    """Raise AdapterError unless the same modules share the masked weight `name` as in its `entry` of `source`."""
    here = other_names(weights, name)
    # Entries of older versions do not tell.
    there = entry.get("shared", here)
    if there != here:
        raise AdapterError(
            f"{source} has {name} shared with {', '.join(there) or 'no other'}, and with "
            f"{', '.join(here) or 'no other'} here; tie the weights as in that training."
        )


def with_scales(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` of `model` by name, and the scales and the like of the packed weights among them."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        base = quantised_base(model, tensor)
        # The checksum of a subclass reads all that it consists of.
        if base is None or is_traceable_wrapper_subclass(tensor) or base.format.refusal(tensor) is not None:
            continue
        found |= {f"{name}.{key}": part for key, part in base.tensors().items() if key != "weight"}
    return found


def tensors_of_blocks(states: Mapping[str, BlockState]) -> set[int]:
    """Return the `id` of every dense weight that carries blocks, and of the blocks."""
    return {id(tensor) for state in states.values() for tensor in (state.weight, state.blocks)}


def tensors_to_save(model: nn.Module, endings: Sequence[str], states: Mapping[str, BlockState]) -> dict[str, Tensor]:
    """Return the tensors to store whole, each once: those of the named modules, but for weights with blocks.

    Raises:
        AdapterError: an ending matches no module.
    """
    found: dict[str, Tensor] = {}
    every = named_tensors(model)
    taken = tensors_of_blocks(states)
    if isinstance(endings, str):
        raise AdapterError(f"modules_to_save={endings!r} is a string; give a list of module-name endings.")
    for ending in endings:
        modules = [name for name, _ in model.named_modules() if name == ending or name.endswith("." + ending)]
        if not modules:
            raise AdapterError(f"modules_to_save: no module name ends in {ending!r}; see model.named_modules().")
        for module in map(plain_name, modules):
            inside = {name: tensor for name, tensor in every.items() if not module or name.startswith(f"{module}.")}
            for name, tensor in inside.items():
                # Packed weights are never trained, and are nothing without their scales.
                if id(tensor) not in taken and format_of(tensor) is None:
                    taken.add(id(tensor))
                    found[name] = tensor
    return found


def frozen_tensors(
    model: nn.Module, states: Mapping[str, BlockState], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the frozen parameters, and buffers such as running means, each once; not those in `whole`.

    Packed weights come with their scales.
    """
    taken = tensors_of_blocks(states) | {id(tensor) for tensor in whole.values()}
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if not tensor.requires_grad and id(tensor) not in taken and _has_values(tensor):
            taken.add(id(tensor))
            found[name] = tensor
    return with_scales(model, found)


def compare_frozen(frozen: Mapping[str, str], every: Mapping[str, Tensor], directory: Path) -> None:
    """Log a warning where tensors in `every` differ from the checksums in `frozen`, those of the training."""
    others = other_frozen(frozen, every)
    if others:
        log.warning(
            "%d frozen weights or buffers are not those that %s was trained beside, %s first; load the same base, or "
            "save what training changed with modules_to_save.",
            len(others),
            directory,
            others[0],
        )


def other_frozen(frozen: Mapping[str, str], every: Mapping[str, Tensor]) -> list[str]:
    """Return the names in `frozen`, a checksum by name, whose tensors in `every` are missing or have other values."""
    return [
        name
        for name, known in frozen.items()
        if name not in every or not _has_values(every[name]) or checksum(every[name]) != known
    ]


def replaced_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the values, on the CPU, that tensors had before an adapter replaced them; the model keeps this dict."""
    found: dict[str, Tensor] = model.__dict__.setdefault("_sylva_replaced", {})
    return found


def bases_of_replaced(model: nn.Module) -> dict[int, Tensor]:
    """Return `replaced_tensors` by the `id` of the tensor that was replaced."""
    replaced = replaced_tensors(model)
    every = named_tensors(model) if replaced else {}
    return {id(every[name]): value for name, value in replaced.items() if name in every}


def check_replaced(replaced: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where a value that an adapter replaced cannot be put back."""
    for name, value in replaced.items():
        found = every.get(name)
        if found is None or found.shape != value.shape:
            here = "gone" if found is None else f"{tuple(found.shape)}"
            raise AdapterError(
                f"{name} was {tuple(value.shape)} when an adapter replaced its values, and is {here} now; put the "
                "module back first, or call merge_and_unload(model) to keep the values."
            )


def check_whole(
    whole: Mapping[str, Tensor], every: Mapping[str, Tensor], masked: Mapping[int, str], source: str
) -> None:
    """Raise AdapterError where a tensor that the adapter `source` stores whole does not fit the model.

    Args:
        whole: the stored tensors by name.
        every: the tensors of the model by name.
        masked: the names of the weights in which the adapter has blocks, by the weight's `id`.
        source: a directory or a name, for the message.
    """
    for name, value in whole.items():
        found = every.get(name)
        if found is None or (found.shape, found.dtype) != (value.shape, value.dtype):
            here = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise AdapterError(
                f"{source} stores {name} {tuple(value.shape)} of {value.dtype}, {here} here; "
                "build the model as in training."
            )
        if id(found) in masked:
            raise AdapterError(
                f"{source} stores {name} whole, which is {masked[id(found)]} with its blocks here; "
                "build the model as in training, where they were two."
            )


def replace_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let tensors hold `values`, by their first names; others that an adapter had replaced get their base back."""
    replaced, every = replaced_tensors(model), named_tensors(model)
    for name in replaced.keys() - values.keys():
        put(every[name], replaced.pop(name))
    for name in values:
        replaced.setdefault(name, values_of(every[name]).to("cpu", copy=True))
    put_tensors(model, values)


def put_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let tensors hold `values`, by name; others, and the base values of those that an adapter replaced, stay."""
    every = named_tensors(model)
    for name, value in values.items():
        put(every[name], value)


def _has_values(tensor: Tensor) -> bool:
    """Whether `tensor` has values to compare; offloaded weights are on the meta device."""
    return tensor.device.type != "meta" and tensor.layout == torch.strided
