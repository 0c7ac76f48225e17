"""`load_adapter`, `unload_adapter` and `merge_and_unload`: put trained blocks into a base model and take them out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.adapters.dequantising import check_may_merge, make_dense, trained_weights
from sylva_compile.adapters.format import read_adapter
from sylva_compile.adapters.other_tensors import (
    bases_of_replaced,
    check_replaced,
    check_shared,
    check_whole,
    compare_frozen,
    named_tensors,
    put_tensors,
    replace_tensors,
    replaced_tensors,
    with_scales,
)
from sylva_compile.adapters.stored import (
    DEFAULT,
    StoredAdapter,
    StoredWeight,
    adapters_of,
    forget_adapters,
    make_room,
    name_the_active,
    states_by_weight,
)
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states, unembed
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.quantised_base import checksum_of, kind_of
from sylva_compile.blocks.scope import check_weight, named_weights, unwrap
from sylva_compile.blocks.shards import put, reshard
from sylva_compile.compiler.kinds import KINDS
from sylva_compile.errors import AdapterError, EmbedError
from sylva_compile.kernels.blocks import matrix_shape
from sylva_compile.quantised.registry import format_of, shape_of


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Masks:
    """Put the blocks saved in `directory` into `model`, whose base weights must be those that they were trained on.

    The dense weights equal those of the trained model bit for bit, and the blocks can be trained on. A model that
    carries the same masks already gets the values into its existing parameters. The log warns if frozen weights or
    buffers without blocks differ from those of the training.

    With a name, a model can have several adapters. The first one is active at once. Further ones are checked against
    the base and stored beside the model, as PEFT's `load_adapter` does; `set_adapter` puts one into the weights. Load
    them before the model is compiled: compiled graphs have room for the input channels of all adapters then.

    Args:
        model: the base, or a model whose blocks were trained or loaded on this base.
        directory: written by `save_adapter`.
        adapter_name: the adapter's name. Left out: the adapter takes the place of the active one, or is "default".

    Returns:
        The masks, bound to `model`; their `config` is that of the masks which were trained.

    Raises:
        AdapterError: there is no adapter, it is damaged, it belongs to another base, or an adapter of this name is
            loaded; the model is as before then.
        ScopeError: a weight cannot carry blocks (quantised, split otherwise than by rows, on the meta device).
        EmbedError: the model carries other masks and no name was given, DistributedDataParallel has wrapped it already,
            `disable_adapter` shows the base, or the call is made under `torch.inference_mode()`.
    """
    directory = Path(directory)
    return load_read(model, directory, *read_adapter(directory), adapter_name=adapter_name)


def load_read(
    model: nn.Module,
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    adapter_name: str | None = None,
    carried: Masks | None = None,
    resumes: bool = False,
) -> Masks:
    """Put an adapter that has been read into `model`; what it returns and raises is as in `load_adapter`.

    Args:
        model: the base, or an embedded model.
        directory: where the adapter was read, for messages.
        config: of the JSON file.
        tensors: of the adapter, by name.
        adapter_name: see `load_adapter`.
        carried: the masks that the model carries, whose blocks move to the places of the adapter's, as many as before.
        resumes: whether the adapter is that of a training that goes on. What it holds whole was trained beside the
            blocks or is a buffer: it takes the place of no other adapter's tensors, and nothing is noted of its base.
    """
    if torch.is_inference_mode_enabled():
        raise EmbedError(
            "Adapters cannot be loaded under torch.inference_mode(), which makes tensors that stay frozen."
        )
    wrapped, model = model, unwrap(model)
    reshard(model)
    states = block_states(model)
    for state in states.values():
        state.check_enabled()
    adapters = adapters_of(model)
    if adapters is not None and adapter_name in adapters.all:
        raise AdapterError(
            f"An adapter {adapter_name!r} is loaded already; give another name, or call delete_adapter(model, "
            f"{adapter_name!r}) first."
        )
    adapter = _checked(model, states, directory, config, tensors, resumes=resumes)
    masks = Masks({name: weight.mask for name, weight in adapter.weights.items()}, config=adapter.config)
    # Bound first: the base has been checked already, and in more detail than `embed` does for masks of another model.
    masks.bind(model)
    if adapters is not None and adapter_name is not None:
        adapters.all[adapter_name] = adapter
        make_room(states, adapters)
        return masks
    if carried is not None:
        carried.move({name: mask for name, mask in masks.items() if carried[name] != mask})
    masks.embed(wrapped)
    try:
        for name, state in block_states(model).items():
            own = adapter.weights[name]
            state.masks_config = dict(masks.config)
            state.take_trained(own.blocks, own.left, own.left_values)
        (put_tensors if resumes else replace_tensors)(model, adapter.whole)
    except BaseException:
        if not states:
            # Out of memory, say: no base with parts of an adapter stays.
            unload_adapter(model)
        raise
    if adapters is None:
        name_the_active(model, adapter_name or DEFAULT)
    return masks


def _checked(
    model: nn.Module,
    states: Mapping[str, BlockState],
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    resumes: bool,
) -> StoredAdapter:
    """Return the adapter that was read from `directory`; it was trained on the base of `model`, or an error follows."""
    parameters, every = named_weights(model), named_tensors(model)
    nowhere = torch.empty(2, 0, dtype=torch.int64, device="cpu")
    weights = {}
    for name, entry in config["weights"].items():
        positions, left = tensors[f"{name}/positions"], tensors.get(f"{name}/left_positions", nowhere)
        mask = BlockMask(tuple(entry["shape"]), entry["block_size"], positions.to(torch.int64))
        weights[name] = StoredWeight(
            mask, tensors[f"{name}/blocks"], left.to(torch.int64), tensors.get(f"{name}/left"), entry["base"]
        )
    by_weight = states_by_weight(states)
    _check_base(model, config, parameters, by_weight, bases_of_replaced(model), directory)
    for name, weight in weights.items():
        weight.blocks = weight.blocks.to(parameters[name].device)
        state = by_weight.get(id(parameters[name]))
        weight.base_id = 0 if state is None else state.base_id
    whole = {name: tensors[f"{name}/whole"] for name in config["modules_to_save"]}
    check_whole(whole, every, {id(parameters[name]): name for name in weights}, str(directory))
    for name, entry in config["weights"].items():
        check_shared(name, entry, parameters, directory)
    check_replaced(replaced_tensors(model), every)
    # A tensor that has several names is kept once, under the first.
    first_names = {id(tensor): name for name, tensor in reversed(every.items())}
    values = {first_names[id(every[name])]: value for name, value in whole.items()}
    if not resumes:
        base = {name: replaced_tensors(model).get(first_names[id(tensor)], tensor) for name, tensor in every.items()}
        compare_frozen(config.get("frozen", {}), with_scales(model, base), directory)
    return StoredAdapter(weights, values, {**config.get("masks", {}), "adapter": str(directory)})


def merge_and_unload(model: nn.Module, *, dequantise: bool = False) -> nn.Module:
    """Make an ordinary model: the trained values stay in the dense weights; blocks and generated classes go.

    Of several adapters, the active one stays, and the others are forgotten. Pruned weights become dense, see `unprune`.

    Args:
        model: an embedded model; one that is not embedded is left alone.
        dequantise: make dense layers, frozen, of the quantised ones that carry blocks. Packed weights cannot hold what
            was trained.

    Returns:
        The model without wrappers (DistributedDataParallel, `torch.compile`), changed in place.

    Raises:
        AdapterError: a weight with blocks is quantised, and `dequantise` is false; the model is as before then.
        EmbedError: a class was made from an embedded one since (a parametrization), or `disable_adapter` shows the
            base; the model is as before then.
    """
    model = unwrap(model)
    states = block_states(model)
    check_may_merge(states, dequantise=dequantise)
    dense = trained_weights(model, states)
    for kind in KINDS:
        kind.unembed(model)
    make_dense(model, dense)
    forget_adapters(model)
    replaced_tensors(model).clear()
    return model


def unload_adapter(model: nn.Module) -> None:
    """Restore the base, bit for bit.

    Masked weights are again what they were before `embed`, and so are modules that an adapter replaced whole. Ordinary
    classes and `requires_grad` come back too. All adapters are forgotten. A model without blocks is left alone.

    Raises:
        AdapterError: a module that the adapter replaced was itself replaced or changed its shape since.
        EmbedError: a base is not known any more, a class was made from an embedded one since (a parametrization), or
            `disable_adapter` shows the base. The model is as before in all these cases.
    """
    model = unwrap(model)
    reshard(model)
    check_replaced(replaced_tensors(model), named_tensors(model))
    unembed(model, restore=True)
    every = named_tensors(model)
    for name, value in replaced_tensors(model).items():
        put(every[name], value)
    replaced_tensors(model).clear()
    forget_adapters(model)


def _check_base(
    model: nn.Module,
    config: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    by_weight: Mapping[int, BlockState],
    replaced: Mapping[int, Tensor],
    directory: Path,
) -> None:
    """Raise AdapterError unless the masked weights have the shapes, dtypes and values of the adapter's base."""
    for name, entry in config["weights"].items():
        weight = parameters.get(name)
        if weight is None:
            raise AdapterError(
                f"{directory} trains {name}, which this model lacks; load it onto the base it was made for."
            )
        state = by_weight.get(id(weight))
        if format_of(weight) is not None:
            # First, since one that was packed for inference seems to be another base.
            check_weight(name, weight)
        kind = kind_of(model, weight) if state is None else state.kind
        found = (list(matrix_shape(shape_of(weight))), kind)
        wanted = (entry["shape"], entry["dtype"])
        if found != wanted:
            raise AdapterError(
                f"{directory} was made for {name} {wanted[0]} {wanted[1]}, which is {found[0]} {found[1]} here; "
                "load the base in that shape and dtype."
            )
        check_weight(name, weight)
        if state is not None:
            base = state.base_checksum()
        else:
            base = checksum(replaced[id(weight)]) if id(weight) in replaced else checksum_of(model, weight)
        if base != entry["base"]:
            raise AdapterError(
                f"{directory} was trained on another base: {name} holds other values here; load that base."
            )
