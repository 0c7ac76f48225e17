"""The one check that DistributedDataParallel averages the gradients of blocks."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sylva_compile._torch import active_ddp, parameters_of_ddp
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.shards import group_of, is_sharded
from sylva_compile.errors import EmbedError

_averaged_by: "weakref.WeakKeyDictionary[BlockState, weakref.ref[Any]]" = weakref.WeakKeyDictionary()
"""The DistributedDataParallel that was found to average the gradients of a state's blocks."""


def check_averaged(states: Iterable[BlockState]) -> None:
    """Check, in a training pass, that the running DistributedDataParallel knows the blocks of `states`.

    Raises:
        EmbedError: it was made before the blocks were embedded. Outside of such a pass nothing is checked.
    """
    ddp = active_ddp()
    if ddp is None:
        return
    for state in states:
        if (known := _averaged_by.get(state)) is not None and known() is ddp:
            continue
        if not any(parameter is state.blocks for parameter in parameters_of_ddp(ddp)):
            raise _not_averaged(state.name)
        _averaged_by[state] = weakref.ref(ddp)


def group_that_averages(states: Iterable[BlockState]) -> Any:
    """Return the process group of the DistributedDataParallel that averages gradients of `states`, or None.

    It is known from the first training pass on.
    """
    for state in states:
        if is_sharded(state.weight):
            return group_of(state.weight)
        ddp = known() if (known := _averaged_by.get(state)) is not None else None
        if ddp is not None:
            return ddp.process_group
    return None


def check_not_wrapped(model: nn.Module, name: str) -> None:
    """Raise EmbedError, about the weight `name`, if DistributedDataParallel has wrapped `model` already."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise _not_averaged(name)


def _not_averaged(name: str) -> EmbedError:
    return EmbedError(
        f"{name}: DistributedDataParallel wrapped the model before its blocks were embedded, and would never average "
        "their gradients; call masks.embed(model) first, then wrap the model."
    )
