"""`disable_adapter`: the base model for a while, in the memory of the trained one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from sylva_compile.adapters.other_tensors import check_replaced, named_tensors, replaced_tensors
from sylva_compile.blocks.base_values import BaseValues
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.blocks.shards import reshard
from sylva_compile.errors import AdapterError, EmbedError


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Let `model` be its base inside of the `with` block; PEFT's method of that name, for any model with blocks.

    Inside, every masked weight holds the values from before training, bit for bit, wherever blocks have ever been, and
    so does every tensor that `load_adapter` replaced whole. Afterwards, and after an error, the trained values are
    back, bit for bit. Blocks keep their values (and float32 masters their low bits) all the time. Values are written
    in place: compiled graphs stay as they are. What was trained beside blocks in this process (a new head) keeps its
    trained values, since no others are kept.

    * Run forward passes inside under `torch.no_grad()` or `torch.inference_mode()`: a backward pass that runs inside,
      or whose forward pass ran there, raises EmbedError (or autograd's RuntimeError). One whose forward pass ran before
      may run afterwards. Gradients that blocks have already stay.
    * `state_dict()` and `save_pretrained` inside hold the base. A state dict refers to the model's memory: copy the
      values that you want to keep.
    * Inside, optimizer steps on the blocks, moves, `load_state_dict`, `to`, copying or pickling the model, and the
      functions of this library that read or change an adapter raise EmbedError.

    Args:
        model: a model with blocks, compiled or not, or a wrapper of it.

    Raises:
        AdapterError: the model carries no blocks, or a tensor that an adapter replaced is gone or has another shape.
        EmbedError: the adapter is disabled already, or a base is not known. The model is as before in these cases. At
            the end: a weight was changed inside.
    """
    model = unwrap(model)
    shown = _show_base(model)
    try:
        yield
    except BaseException:
        reshard(model)
        shown.put_back(check=False)
        raise
    reshard(model)
    shown.put_back()


def is_disabled(model: nn.Module) -> bool:
    """Whether `model` shows its base now."""
    return any(state.disabled for state in block_states(model).values())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _show_base(model: nn.Module) -> BaseValues:
    states = block_states(model)
    check_embedded(states)
    reshard(model)
    replaced = replaced_tensors(model)
    every = named_tensors(model) if replaced else {}
    check_replaced(replaced, every)
    for state in states.values():
        if state.disabled:
            raise EmbedError("The adapter is disabled already; one disable_adapter block lies inside of another.")
        state.sync()
        state.check_base_known()
    shown = BaseValues()
    try:
        # Tensors that are made here must be ordinary ones, since they are written outside of inference mode.
        with torch.inference_mode(False):
            for state in states.values():
                shown.show_weight(state)
            for name, base in replaced.items():
                shown.show_tensor(every[name], base)
    except BaseException:
        shown.put_back(check=False)
        raise
    return shown


def check_embedded(states: Mapping[str, BlockState]) -> None:
    """Raise AdapterError if there are no embedded weights."""
    if not states:
        raise AdapterError(
            "This model carries no trained blocks, and so no base beside its weights; embed masks or load an adapter "
            "first."
        )
