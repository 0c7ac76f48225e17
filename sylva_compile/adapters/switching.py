"""`set_adapter`, `delete_adapter`, `active_adapter` and `list_adapters`: several adapters on one base, by name."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sylva_compile.adapters.other_tensors import (
    bases_of_replaced,
    check_replaced,
    check_whole,
    named_tensors,
    replace_tensors,
    replaced_tensors,
)
from sylva_compile.adapters.stored import (
    Adapters,
    StoredAdapter,
    StoredWeight,
    adapters_of,
    fits_in_place,
    make_room,
    states_by_weight,
)
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states, embed, unembed
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.moving import check_no_gradients, check_same_on_all_ranks, restart_optimizers, unwrapped
from sylva_compile.blocks.quantised_base import checksum_of
from sylva_compile.blocks.scope import check_weight, named_weights, unwrap
from sylva_compile.blocks.shards import reshard
from sylva_compile.embedded.wrapping import check_not_wrapped
from sylva_compile.errors import AdapterError, EmbedError
from sylva_compile.kernels.blocks import matrix_shape
from sylva_compile.quantised.registry import shape_of


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter whose values are in the weights ("default" if unnamed); None without blocks."""
    adapters = adapters_of(model)
    return None if adapters is None else adapters.active


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of all adapters of `model`, the active one among them, in the order in which they came."""
    adapters = adapters_of(model)
    return [] if adapters is None else list(adapters.all)


def set_adapter(model: nn.Module, adapter_name: str) -> Masks:
    """Put the adapter of that name into the weights; the active one is stored, as it is now, bit for bit.

    Where both adapters have as many blocks of one size in a weight, the weight switches in place: parameters and
    compiled graphs stay (but one further graph is compiled where the new adapter reads more input channels than any
    that was loaded when the graph was). Other weights lose their blocks and get new ones, so that graphs are compiled
    again; make a new optimizer then, with `masks.parameters()`. Optimizer states start anew, as after a move. Every
    process of a training must call it.

    Tensors that an adapter stores whole (`modules_to_save`) switch too. What is trained beside blocks without being
    loaded from an adapter belongs to the model, and stays.

    Returns:
        The masks of the adapter, bound to `model`.

    Raises:
        AdapterError: no adapter of this name is loaded, a weight holds another base than the adapter was trained on, or
            a tensor that an adapter replaced is gone.
        EmbedError: blocks have gradients, a base is not known, DistributedDataParallel has wrapped the model and blocks
            cannot switch in place, the processes set different adapters, or `disable_adapter` shows the base.
        ScopeError: a weight cannot carry blocks. The model is as before in all these cases.
    """
    wrapped, model = model, unwrap(model)
    adapters, target = _find(model, adapter_name)
    if target is not None:
        states = block_states(model)
        _check(wrapped, states, target, adapter_name)
        before = StoredAdapter.of(model, states)
        _note_bases(states, target, [before, *adapters.stored.values()])
        try:
            _put(model, target)
        except BaseException:
            _put(model, before)
            raise
        adapters.all |= {adapters.active: before, adapter_name: None}
        adapters.active = adapter_name
        now = block_states(model)
        for state in set(states.values()) & set(now.values()):
            restart_optimizers(state)
        _forget_states(model, {*before.whole, *target.whole}, [*states.values(), *now.values()])
        make_room(now, adapters)
    states = block_states(model)
    config = next(iter(states.values())).masks_config
    return Masks({name: state.mask for name, state in states.items()}, model=model, config=config)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget a stored adapter.

    Raises:
        AdapterError: no adapter of this name is loaded, or it is the active one.
    """
    adapters, target = _find(model, adapter_name)
    if target is None:
        raise AdapterError(
            f"The adapter {adapter_name!r} is active; set another one first, or call unload_adapter(model) to go back "
            "to the base."
        )
    del adapters.all[adapter_name]


def _find(model: nn.Module, name: str) -> tuple[Adapters, StoredAdapter | None]:
    """Return the adapters of `model` and the one of that name, None if it is active."""
    adapters = adapters_of(model)
    if adapters is None or name not in adapters.all:
        loaded = "none is" if adapters is None else f"loaded are {', '.join(adapters.all)}"
        raise AdapterError(
            f"No adapter {name!r} is loaded, {loaded}; call load_adapter(model, directory, {name!r}) first."
        )
    return adapters, adapters.all[name]


def _check(wrapped: nn.Module, states: Mapping[str, BlockState], target: StoredAdapter, adapter_name: str) -> None:
    """Raise an error unless `target` can take the place of the blocks of `states`."""
    if torch.is_inference_mode_enabled():
        raise EmbedError("Adapters cannot be set under torch.inference_mode(), which makes tensors that stay frozen.")
    for name, state in states.items():
        state.check_enabled()
        check_no_gradients(name, state)
        state.sync()
        state.check_base_known()
    reshard(unwrap(wrapped))
    parameters, by_weight = named_weights(wrapped), states_by_weight(states)
    replaced = bases_of_replaced(unwrap(wrapped))
    for name, weight in target.weights.items():
        if name not in states or not fits_in_place(states[name], weight):
            check_not_wrapped(wrapped, name)
        here = parameters.get(name)
        _check_base(unwrap(wrapped), name, weight, here, by_weight.get(id(here)), replaced.get(id(here)), adapter_name)
    every = named_tensors(wrapped)
    for name in {*replaced_tensors(unwrap(wrapped)), *target.whole}:
        if name in every and every[name].grad is not None:
            raise EmbedError(
                f"{name} has a gradient, and an adapter stores its values; step the optimizer and call "
                "zero_grad(set_to_none=True) before setting another adapter."
            )
    masked = {id(parameters[name]): name for name in target.weights}
    check_whole(target.whole, every, masked, f"Adapter {adapter_name!r}")
    check_replaced(replaced_tensors(unwrap(wrapped)), every)
    check_same_on_all_ranks(states.values(), {name: weight.mask for name, weight in target.weights.items()})


def _check_base(
    model: nn.Module,
    name: str,
    stored: StoredWeight,
    weight: nn.Parameter | None,
    state: BlockState | None,
    replaced: Tensor | None,
    adapter_name: str,
) -> None:
    """Raise AdapterError unless the weight has the base that the adapter was trained on.

    `replaced` are the weight's values before the active adapter, which stores it whole, replaced them.
    """
    if state is not None and state.base_id == stored.base_id:
        return
    if weight is not None and matrix_shape(shape_of(weight)) == stored.mask.shape:
        check_weight(name, weight)
        if state is not None:
            base = state.base_checksum()
        else:
            base = checksum_of(model, weight) if replaced is None else checksum(replaced)
        if base == stored.base:
            return
    raise AdapterError(
        f"Adapter {adapter_name!r} was trained on another base: {name} holds other values now, or is gone; load that "
        "base, and the adapter again."
    )


def _note_bases(states: Mapping[str, BlockState], target: StoredAdapter, adapters: list[StoredAdapter]) -> None:
    """Where a weight loses its blocks, note the base's checksum in each adapter that knows the base by number only."""
    for name, state in states.items():
        if name in target.weights and fits_in_place(state, target.weights[name]):
            continue
        known = [adapter.weights[name] for adapter in adapters if name in adapter.weights]
        nameless = [weight for weight in known if weight.base is None and weight.base_id == state.base_id]
        if nameless:
            base = state.base_checksum()
            for weight in nameless:
                weight.base = base


def _put(model: nn.Module, target: StoredAdapter) -> None:
    """Let `model` carry `target`, whatever it carries now."""
    states = block_states(model)
    masks = {name: weight.mask for name, weight in target.weights.items()}
    staying = {name for name, state in states.items() if name in masks and fits_in_place(state, target.weights[name])}
    # Tensors that were replaced may be weights that get blocks now: those belong into the base.
    replace_tensors(model, {})
    # First the one thing that may be refused, while nothing of the active adapter has gone. Weights that carry blocks
    # come second: others of them, or a shared weight under another of its names.
    parameters, by_weight = named_weights(model), states_by_weight(states)
    embed(model, {name: mask for name, mask in masks.items() if id(parameters[name]) not in by_weight}, beside=True)
    unembed(model, restore=True, names=states.keys() - staying)
    carried = block_states(model)
    embed(model, {name: mask for name, mask in masks.items() if name not in carried}, beside=True)
    for name, state in block_states(model).items():
        own = target.weights[name]
        if id(state.weight) in by_weight:
            state.base_id = by_weight[id(state.weight)].base_id
        state.masks_config = dict(target.config)
        state.take_trained(own.blocks, own.left, own.left_values, own.mask)
    replace_tensors(model, target.whole)


def _forget_states(model: nn.Module, names: Iterable[str], states: Iterable[BlockState]) -> None:
    """Let the optimizers that have stepped the blocks of `states` start anew on the tensors `names` of `model`."""
    every = named_tensors(model)
    for optimizer in {unwrapped(each) for state in states for each in state.stepped_by}:
        for name in names:
            if name in every:
                optimizer.state.pop(every[name], None)
