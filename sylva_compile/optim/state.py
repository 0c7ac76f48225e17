"""What an optimizer keeps for a parameter, in torch's form, made fit for a kernel that reads it by address."""

from typing import Any

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.lowering import Rule


def lies_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side in memory, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def laid_out_as(tensor: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` itself if it has the dtype and lies on the device and in the layout of `like`, else a copy that does."""
    same = tensor.dtype == dtype and tensor.device == like.device
    if same and (tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())):
        return tensor
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(tensor)


def settle_state(
    state: dict[str, Any], parameter: Tensor, rule: Rule, dtype: torch.dtype | None, *, counted: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Make what is missing and follow the parameter to another device or layout, in place.

    Args:
        state: `optimizer.state[parameter]`: loaded from any checkpoint, empty, or as it was left.
        parameter: the parameter.
        rule: whose states are wanted.
        dtype: of the states; None keeps what is there and makes new ones in the parameter's.
        counted: whether the steps are counted, under "step" as in torch.

    Returns:
        The states in the rule's order, and the count, float32 `[]` on the parameter's device.

    Raises:
        ArgumentError: a state has another shape than its parameter.
    """
    count = None
    if counted:
        count = state.get("step")
        if not isinstance(count, Tensor) or count.dtype != torch.float32 or count.device != parameter.device:
            # torch's SGD counts nothing, but a buffer that is there has seen a first step.
            started = any(state.get(name) is not None for _, name in rule.states)
            known = float(started) if count is None else count
            state["step"] = count = torch.as_tensor(known, dtype=torch.float32, device=parameter.device)
    states = []
    for _, name in rule.states:
        value = state.get(name)
        if value is None:
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        elif value.shape != parameter.shape:
            raise ArgumentError(
                f"{name} is {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}; load a state dict that "
                "was made for these parameters."
            )
        state[name] = laid_out_as(value, parameter, dtype or value.dtype)
        states.append(state[name])
    return tuple(states), count
