"""`save_training` and `load_training`: the adapter of a training that stops and goes on exactly where it stopped.

An adapter that `save_adapter` writes holds what inference needs. That of a training also holds every other parameter
that is trained, and the buffers, which batches may change. Loading it is strict: the model must be that of the
training, and values go into its existing parameters, which optimizers hold.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.adapters.format import read_adapter
from sylva_compile.adapters.loading import load_read
from sylva_compile.adapters.other_tensors import named_tensors, other_frozen, tensors_of_blocks, with_scales
from sylva_compile.adapters.saving import states_to_save, write_trained
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import unwrap
from sylva_compile.blocks.shards import reshard
from sylva_compile.errors import AdapterError


def save_training(model: nn.Module, directory: Path, parameters: Iterable[Tensor] = ()) -> None:
    """Write the blocks of `model`, every other parameter that is trained, and its buffers, as an adapter.

    Args:
        model: an embedded model.
        directory: made if missing; an adapter that is there already is replaced in one step.
        parameters: those of the optimizer, which may hold some that are frozen at the moment.

    Raises:
        AdapterError, EmbedError: as `save_adapter`; an older adapter stays then.
    """
    model = unwrap(model)
    states = states_to_save(model)
    write_trained(model, directory, states, trained_beside(model, states, parameters))


def load_training(model: nn.Module, directory: Path, masks: Masks | None = None) -> None:
    """Put the values that `save_training` wrote into the embedded `model` and its existing parameters.

    Gradients of the blocks are dropped.

    Args:
        model: the model of the training, embedded.
        directory: with the adapter.
        masks: those that the model carries, where its blocks move; they go to where they were. None: the adapter must
            have its blocks at the places of the model's.

    Raises:
        AdapterError: there is no adapter, it is damaged, or it is of another base, other masks or other trained
            parameters; the model is as before then.
    """
    model = unwrap(model)
    states = block_states(model)
    if not states:
        raise AdapterError(f"The model carries no blocks to resume {directory}; call masks.embed(model) first.")
    config, tensors = read_adapter(directory)
    reshard(model)
    check_masks(config, tensors, states, directory, may_move=masks is not None)
    check_others(config, model, states, directory)
    for state in states.values():
        state.blocks.grad = None
    load_read(model, directory, config, tensors, carried=masks, resumes=True)


def trained_beside(
    model: nn.Module, states: Mapping[str, BlockState], parameters: Iterable[Tensor] = (), *, buffers: bool = True
) -> dict[str, Tensor]:
    """Return the trained parameters beside the blocks, and the buffers of a state dict; shared ones once.

    `parameters` are those of an optimizer, which may hold some that are frozen at the moment.
    """
    taken = tensors_of_blocks(states)
    wanted = {id(parameter) for parameter in parameters}
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        trained = tensor.requires_grad or id(tensor) in wanted or (buffers and not isinstance(tensor, nn.Parameter))
        if trained and id(tensor) not in taken:
            taken.add(id(tensor))
            found[name] = tensor
    return found


def check_masks(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    states: Mapping[str, BlockState],
    source: Path | str,
    *,
    may_move: bool,
) -> None:
    """Raise AdapterError unless what was read has blocks of the same weights, in the same number and size.

    Args:
        config: `weights`, each with its number of `blocks` and their `block_size`.
        tensors: `<name>/positions` of every weight.
        states: the embedded weights of the model.
        source: where it was read.
        may_move: whether blocks may lie elsewhere.
    """
    weights = config["weights"]
    if strange := sorted(weights.keys() ^ states.keys()):
        where = "there but not here" if strange[0] in weights else "here but not there"
        raise AdapterError(
            f"{source} was made with other masks: {strange[0]} has blocks {where}; embed the masks of that training."
        )
    for name, state in states.items():
        there = (weights[name]["blocks"], weights[name]["block_size"])
        here = (state.mask.nnz, state.mask.block_size)
        if there != here:
            raise AdapterError(
                f"{source} was made with other masks: {name} has {there[0]} blocks of {there[1]} there and "
                f"{here[0]} of {here[1]} here; embed the masks of that training."
            )
        if not may_move and not torch.equal(tensors[f"{name}/positions"].to(torch.int64), state.mask.positions):
            raise AdapterError(
                f"{source} was made with other masks: the blocks of {name} lie elsewhere; embed the masks of that "
                "training, and give the schedule that moved them."
            )


def check_others(
    config: Mapping[str, Any], model: nn.Module, states: Mapping[str, BlockState], source: Path | str
) -> None:
    """Raise AdapterError unless what is trained beside the blocks is there, and what is frozen is the same.

    `config` has the names of what is there as `modules_to_save`, and checksums by name as `frozen`.
    """
    every = named_tensors(model)
    stored = {id(every[name]) for name in config["modules_to_save"] if name in every}
    for name, tensor in trained_beside(model, states, buffers=False).items():
        if id(tensor) not in stored:
            raise AdapterError(
                f"{name} requires grad and is not in {source}; freeze it, as it was in that training, or begin anew."
            )
    if others := other_frozen(config["frozen"], with_scales(model, every)):
        raise AdapterError(
            f"{source} was trained on another base: {len(others)} frozen weights differ, {others[0]} first; load "
            "that base."
        )
