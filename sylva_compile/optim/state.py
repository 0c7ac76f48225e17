"""Parameters that a kernel can step, and their states in torch's form, laid out to be read by address."""

from typing import Any

import torch
from torch import Tensor

from sylva_compile._torch import is_traceable_wrapper_subclass
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.lowering import Rule
from sylva_compile.kernels.step.table import TYPES


def lies_dense(tensor: Tensor) -> bool:
    """Return whether the elements lie side by side in memory, in any order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def laid_out_as(tensor: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor`, or a copy, in `dtype` and in the device and memory layout of `like`, which has its shape."""
    same = tensor.dtype == dtype and tensor.device == like.device
    if same and (tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())):
        return tensor
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(tensor)


def settle_state(
    state: dict[str, Any], parameter: Tensor, rule: Rule, dtype: torch.dtype | None, *, counted: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Add missing states to `state` and lay all of them out as the parameter, in place.

    Args:
        state: `optimizer.state[parameter]`: empty, from an earlier step, or loaded from a checkpoint.
        parameter: the parameter, any shape.
        rule: the rule that names the states.
        dtype: the dtype of the states; None keeps that of existing states and gives new ones the parameter's.
        counted: whether `state["step"]` counts the steps, as in torch.

    Returns:
        The states, each in the parameter's shape, in the rule's order; and the count, float32 `[]` on the parameter's
        device, or None if steps are not counted.

    Raises:
        ArgumentError: a state has another shape than its parameter.
    """
    count = None
    if counted:
        count = state.get("step")
        if not isinstance(count, Tensor) or count.dtype != torch.float32 or count.device != parameter.device:
            # torch's SGD does not count steps, but a momentum buffer exists only after a first step.
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


def check_parameter(parameter: Tensor, over_blocks: bool) -> None:
    """Raise ArgumentError for a parameter that no kernel can step, or that a rule over blocks cannot."""
    if is_traceable_wrapper_subclass(parameter):
        raise ArgumentError(
            f"A parameter is a {type(parameter).__name__}, whose values lie elsewhere (fully_shard makes them); train "
            "with DistributedDataParallel, or step it with torch's own optimizer."
        )
    if parameter.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ArgumentError(f"A parameter holds {parameter.dtype} values; give those of {known} only.")
    if over_blocks and (parameter.dim() != 3 or parameter.shape[1] != parameter.shape[2]):
        raise ArgumentError(
            f"A parameter of shape {tuple(parameter.shape)} holds no square blocks [n, b, b]; put it into a param "
            "group of its own with a rule for elements, such as {'params': [...], 'rule': 'adamw'}."
        )
