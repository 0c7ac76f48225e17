"""`save_adapter`: write the trained blocks of a model, and where they sit."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.adapters.format import write_adapter
from sylva_compile.adapters.on_first_rank import on_first_rank
from sylva_compile.adapters.other_tensors import (
    frozen_tensors,
    named_tensors,
    other_names,
    replaced_tensors,
    tensors_of_blocks,
    tensors_to_save,
)
from sylva_compile.blocks.block_mask import SUFFIX
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.scope import named_weights, unwrap
from sylva_compile.blocks.shards import reshard
from sylva_compile.blocks.shards import whole as values_of
from sylva_compile.errors import AdapterError
from sylva_compile.lost_ranks import naming_lost_ranks

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, modules_to_save: Sequence[str] = ()) -> None:
    """Write the trained blocks of `model` to `directory`, with the settings that chose them.

    Where blocks have moved, the adapter holds what they learnt at every place.

    Args:
        model: an embedded model.
        directory: made if missing; an adapter that is there already is replaced in one step.
        modules_to_save: endings of module names whose parameters and buffers are stored whole beside the blocks, such
            as `["classifier"]` for a head that was trained densely (PEFT's word for the same).

    Raises:
        AdapterError: the model carries no blocks, values are not finite, a name in `modules_to_save` matches nothing,
            or the directory cannot be written. An older adapter stays then.
        EmbedError: blocks and dense weights differ, a base is not known any more, or `disable_adapter` shows it. An
            older adapter stays then.
    """
    model = unwrap(model)
    states = states_to_save(model)
    whole = tensors_to_save(model, modules_to_save, states)
    _warn_of_masked_modules(states, modules_to_save)
    _warn_of_lost_parameters(model, states, whole)
    write_trained(model, Path(directory), states, whole)


def states_to_save(model: nn.Module) -> dict[str, BlockState]:
    """Return the embedded weights of `model`. Raises AdapterError where it has none."""
    states = block_states(model)
    if not states:
        raise AdapterError("This model carries no trained blocks; call masks.embed(model) before training and saving.")
    reshard(model)
    return states


@naming_lost_ranks("the saving of an adapter", "the adapter of before is whole; start the job again")
def write_trained(
    model: nn.Module, directory: Path, states: Mapping[str, BlockState], whole: Mapping[str, Tensor]
) -> None:
    """Write an adapter of the blocks in `states` and of the tensors in `whole`; the errors are those of save_adapter.

    Args:
        model: the model without wrappers.
        directory: made if missing.
        states: all embedded weights of the model.
        whole: parameters and buffers that are stored whole, by name, each once.
    """
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    names = named_weights(model)
    for name, state in states.items():
        state.check_enabled()
        state.sync()
        blocks = state.zero_outside(state.whole_blocks())
        _check_finite(name + SUFFIX, blocks)
        state.check_synced()
        state.check_base_known()
        tensors[f"{name}/blocks"] = blocks.cpu().contiguous()
        tensors[f"{name}/positions"] = state.mask.positions.to(torch.int32)
        left, values = state.left_behind()
        if left.shape[1]:
            _check_finite(name, values)
            tensors[f"{name}/left_positions"] = left.to(torch.int32).contiguous()
            tensors[f"{name}/left"] = values.contiguous()
        weights[name] = {
            "shape": list(state.mask.shape),
            "block_size": state.mask.block_size,
            "blocks": state.mask.nnz,
            "dtype": state.kind,
            "base": state.base_checksum(),
            "shared": other_names(names, name),
        }
    for name, value in whole.items():
        # A buffer may be a mask of attention scores, with -infinity where nothing is attended to.
        values = values_of(value)
        _check_finite(name, values, infinity=not isinstance(value, nn.Parameter))
        tensors[f"{name}/whole"] = values.to("cpu", copy=True).contiguous()
    entries = {
        # Where an adapter was loaded from is a path of this machine.
        "masks": {key: value for key, value in next(iter(states.values())).masks_config.items() if key != "adapter"},
        "weights": weights,
        "modules_to_save": {name: checksum(value) for name, value in whole.items()},
        "frozen": {name: checksum(value) for name, value in frozen_tensors(model, states, whole).items()},
    }
    on_first_rank(states.values(), lambda: write_adapter(directory, tensors, entries))


def _check_finite(name: str, value: Tensor, *, infinity: bool = False) -> None:
    """Raise AdapterError if `value` holds NaN, or infinity where that is not allowed."""
    if value.is_floating_point() and bool((value.isnan() if infinity else ~value.isfinite()).any()):
        raise AdapterError(f"{name} holds NaN or infinity; go back to the last good state before saving.")


def _warn_of_masked_modules(states: Mapping[str, BlockState], endings: Sequence[str]) -> None:
    """Warn of weights that `modules_to_save` names although they carry blocks."""
    for name in states:
        owner = "." + name.rpartition(".")[0] + "."
        if any(f".{ending}." in owner for ending in endings):
            log.warning(
                "%s carries blocks, so that the adapter holds these and not all of the weight, and the base must hold "
                "the same values; leave it out of the scope to save it whole.",
                name,
            )


def _warn_of_lost_parameters(model: nn.Module, states: Mapping[str, BlockState], whole: Mapping[str, Tensor]) -> None:
    """Warn if no block can be trained, or if trained parameters are not in the adapter."""
    if not any(state.blocks.requires_grad for state in states.values()):
        log.warning(
            "No block of this model requires grad, so no optimizer trains any; wrap the model for PEFT first, and then "
            "embed the masks."
        )
    kept = tensors_of_blocks(states) | {id(tensor) for tensor in whole.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        log.warning(
            "%d trainable parameters outside of the blocks are not in this adapter, %s first; freeze them, or name "
            "their modules in modules_to_save.",
            len(lost),
            lost[0],
        )
    replaced = replaced_tensors(model)
    every = named_tensors(model) if replaced else {}
    dropped = [name for name in replaced if name in every and id(every[name]) not in kept]
    if dropped:
        log.warning(
            "%d tensors that a loaded adapter holds whole are not in this one, %s first; name their modules in "
            "modules_to_save.",
            len(dropped),
            dropped[0],
        )
