"""The state of an optimizer whose parameters `fully_shard` has split, as one process would have it.

For files that one process writes, of the Trainer and of accelerate; `optimizer_states` keeps states split, for
`torch.distributed.checkpoint`. These files hold whole states, so that a training goes on with any number of processes,
under FSDP2 or without it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.shards import is_sharded, local, put, whole


def whole_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of `optimizer` with whole tensors; those that were split are on the CPU.

    All processes call it, and all get it.
    """
    state_dict = optimizer.state_dict()
    states = {
        number: {name: whole(value).cpu() if is_sharded(value) else value for name, value in state.items()}
        for number, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def load_whole_state_dict(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load what `whole_state_dict` returned, or an ordinary state dict; each process keeps its part of split states."""
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    # The optimizer itself complains where these are not as many.
    for number, parameter in zip(saved, held, strict=False):
        if is_sharded(parameter) and number in states:
            states[number] = {name: _split(value, parameter) for name, value in states[number].items()}
    optimizer.load_state_dict({**state_dict, "state": states})


def _split(value: Any, parameter: Tensor) -> Any:
    """Return `value` split as `parameter` is, if it is a tensor of its shape: not the number of steps."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    held = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    put(held, value.to(local(held).device))
    return held
