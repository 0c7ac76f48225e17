"""`load_adapter`, `unload_adapter` and `merge_and_unload`: put trained blocks into a base model and take them out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.adapters.format import read_adapter
from sylva_compile.adapters.other_tensors import compare_frozen, named_tensors
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states, unembed
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import check_weight, named_weights, unwrap
from sylva_compile.errors import AdapterError

_REPLACED = "_sylva_replaced"


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Masks:
    """Put the blocks saved in `directory` into `model`, whose base weights must be those that they were trained on.

    The dense weights equal those of the trained model bit for bit, and the blocks can be trained on. A model that
    carries the same masks already gets the values into its existing parameters. The log warns if frozen weights or
    buffers without blocks differ from those of the training.

    Returns:
        The masks, bound to `model`; their `config` is that of the masks which were trained.

    Raises:
        AdapterError: there is no adapter, it is damaged, or it belongs to another base; the model is as before then.
        ScopeError: a weight cannot carry blocks (quantised, sharded, on the meta device).
        EmbedError: the model carries other masks, or DistributedDataParallel has wrapped it already.
    """
    directory = Path(directory)
    return load_read(model, directory, *read_adapter(directory))


def load_read(
    model: nn.Module,
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    carried: Masks | None = None,
) -> Masks:
    """Put an adapter that has been read into `model`; what it returns and raises is as in `load_adapter`.

    Args:
        model: the base, or an embedded model.
        directory: where the adapter was read, for messages.
        config: of the JSON file.
        tensors: of the adapter, by name.
        carried: the masks that the model carries, whose blocks move to the places of the adapter's, as many as before.
    """
    wrapped, model = model, unwrap(model)
    masks = Masks(
        {
            name: BlockMask(tuple(entry["shape"]), entry["block_size"], tensors[f"{name}/positions"].to(torch.int64))
            for name, entry in config["weights"].items()
        },
        config={**config.get("masks", {}), "adapter": str(directory)},
    )
    parameters = named_weights(model)
    _check_base(config, parameters, block_states(model), directory)
    every = named_tensors(model)
    whole = {name: tensors[f"{name}/whole"] for name in config["modules_to_save"]}
    _check_whole(whole, every, {id(parameters[name]): name for name in masks}, directory)
    _check_replaced(model.__dict__.get(_REPLACED, {}), every)
    # A tensor that has several names is kept once, under the first.
    first_names = {id(tensor): name for name, tensor in reversed(every.items())}
    values = {first_names[id(every[name])]: value for name, value in whole.items()}
    compare_frozen(config.get("frozen", {}), every, directory)
    # Bound first: the base has been checked already, and in more detail than `embed` does for masks of another model.
    masks.bind(model)
    if carried is not None:
        carried.move({name: mask for name, mask in masks.items() if carried[name] != mask})
    masks.embed(wrapped)
    with torch.no_grad():
        for name, state in block_states(model).items():
            state.masks_config = dict(masks.config)
            left = tensors.get(f"{name}/left_positions", torch.empty(2, 0, dtype=torch.int64)).to(torch.int64)
            state.take_trained(tensors[f"{name}/blocks"], left, tensors.get(f"{name}/left"))
        replaced = model.__dict__.setdefault(_REPLACED, {})
        for name in replaced.keys() - values.keys():
            # An adapter that was loaded before replaced this tensor; this adapter was trained beside the base's.
            every[name].copy_(replaced.pop(name))
        for name, value in values.items():
            replaced.setdefault(name, every[name].detach().to("cpu", copy=True))
            every[name].copy_(value)
    return masks


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Make an ordinary model: the trained values stay in the dense weights; blocks and generated classes go.

    Returns:
        The model without wrappers (DistributedDataParallel, `torch.compile`), changed in place.

    Raises:
        EmbedError: a class was made from an embedded one since (a parametrization); the model is as before then.
    """
    model = unwrap(model)
    unembed(model)
    model.__dict__.pop(_REPLACED, None)
    return model


def unload_adapter(model: nn.Module) -> None:
    """Restore the base, bit for bit.

    Masked weights are again what they were before `embed`, and so are modules that an adapter replaced whole. Ordinary
    classes and `requires_grad` come back too. A model without blocks is left alone.

    Raises:
        AdapterError: a module that the adapter replaced was itself replaced or changed its shape since.
        EmbedError: a base is not known any more, or a class was made from an embedded one since (a parametrization).
            The model is as before in either case.
    """
    model = unwrap(model)
    _check_replaced(model.__dict__.get(_REPLACED, {}), named_tensors(model))
    unembed(model, restore=True)
    every = named_tensors(model)
    with torch.no_grad():
        for name, value in model.__dict__.pop(_REPLACED, {}).items():
            every[name].copy_(value)


def _check_whole(
    whole: Mapping[str, Tensor], every: Mapping[str, Tensor], masked: Mapping[int, str], directory: Path
) -> None:
    """Raise AdapterError where a tensor that the adapter stores whole does not fit the model."""
    for name, value in whole.items():
        found = every.get(name)
        if found is None or (found.shape, found.dtype) != (value.shape, value.dtype):
            here = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise AdapterError(
                f"{directory} stores {name} {tuple(value.shape)} of {value.dtype}, {here} here; "
                "build the model as in training."
            )
        if id(found) in masked:
            raise AdapterError(
                f"{directory} stores {name} whole, which is {masked[id(found)]} with its blocks here; "
                "build the model as in training, where they were two."
            )


def _check_replaced(replaced: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where a value that an adapter replaced cannot be put back."""
    for name, value in replaced.items():
        found = every.get(name)
        if found is None or found.shape != value.shape:
            here = "gone" if found is None else f"{tuple(found.shape)}"
            raise AdapterError(
                f"{name} was {tuple(value.shape)} when an adapter replaced its values, and is {here} now; put the "
                "module back first, or call merge_and_unload(model) to keep the values."
            )


def _check_base(
    config: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, BlockState],
    directory: Path,
) -> None:
    """Raise AdapterError unless the masked weights have the shapes, dtypes and values of the adapter's base."""
    for name, entry in config["weights"].items():
        weight = parameters.get(name)
        if weight is None:
            raise AdapterError(
                f"{directory} trains {name}, which this model lacks; load it onto the base it was made for."
            )
        found = (list(weight.shape), str(weight.dtype).removeprefix("torch."))
        wanted = (entry["shape"], entry["dtype"])
        if found != wanted:
            raise AdapterError(
                f"{directory} was made for {name} {wanted[0]} {wanted[1]}, which is {found[0]} {found[1]} here; "
                "load the base in that shape and dtype."
            )
        check_weight(name, weight)
        base = states[name].base_weight() if name in states else weight
        if checksum(base) != entry["base"]:
            raise AdapterError(
                f"{directory} was trained on another base: {name} holds other values here; load that base."
            )
