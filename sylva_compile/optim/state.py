"""Parameters that a kernel can step, and their states in torch's form, laid out to be read by address."""

from typing import Any, get_args

import torch
from torch import Tensor

from sylva_compile._torch import is_traceable_wrapper_subclass
from sylva_compile.blocks.moving import Carry
from sylva_compile.blocks.shards import is_sharded, put, whole
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
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Add missing states to `state` and lay all of them out as the parameter, in place.

    Args:
        state: `optimizer.state[parameter]`: empty, from an earlier step, or loaded from a checkpoint.
        parameter: the parameter, any shape.
        rule: the rule that names the states.
        dtype: the dtype of the states; None keeps that of existing states and gives new ones the parameter's.
        counted: whether `state["step"]` counts the steps, as in torch.

    Returns:
        The states, each in the parameter's shape, in the rule's order; the count, float32 `[]` on the parameter's
        device, or None if steps are not counted; and the counts at which the states of each block started, float32
        `[nnz]`, or None if all started with the first step or the rule does not read the number of the step.

    Raises:
        ArgumentError: a state has another shape than its parameter, or blocks that have moved are not contiguous.
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
    born = _settle_born(state, parameter) if "born" in state and rule.counts_steps else None
    return tuple(states), count, born


def _settle_born(state: dict[str, Any], parameter: Tensor) -> Tensor | None:
    """Return `state["born"]`, float32 `[nnz]` on the parameter's device from now on; None if there is none."""
    born = state.get("born")
    if born is None:
        return None
    if parameter.dim() != 3 or born.shape != parameter.shape[:1]:
        raise ArgumentError(
            f"born is {tuple(born.shape)} for a parameter of {tuple(parameter.shape)}; load a state dict that was made "
            "for these blocks."
        )
    settled: Tensor = born.to(parameter.device, torch.float32).contiguous()
    state["born"] = settled
    return settled


def move_blocks(state: dict[str, Any], parameter: Tensor, order: Tensor, carry: Carry) -> None:
    """Let `state`, which is `optimizer.state[parameter]` or empty, follow blocks that moved, in place.

    The arguments and errors are those of `GeneratedOptimizer.move_state`.
    """
    if carry not in get_args(Carry):
        raise ArgumentError(f"carry={carry!r}; use 'intersection' or 'none'.")
    count = parameter.shape[0] if parameter.dim() == 3 else -1
    if order.shape != (count,) or bool(((order < -1) | (order >= count)).any()):
        raise ArgumentError(
            f"order is {tuple(order.shape)} for a parameter of {tuple(parameter.shape)}; give the earlier index of "
            "each block [b, b], or -1 for a block that has arrived."
        )
    born = _settle_born(state, parameter)
    states = [
        value
        for name, value in state.items()
        if name not in ("step", "born") and isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    counted = state.get("step") is not None
    if counted:
        # Older versions of torch save a number.
        state["step"] = torch.as_tensor(state["step"])
    if carry == "none":
        for value in (*states, *([state["step"]] if counted else [])):
            value.zero_()
        state.pop("born", None)
        return
    arrived, earlier = order < 0, order.clamp(min=0)
    for value in states:
        moved = whole(value)[earlier.to(value.device)]
        put(value, moved.masked_fill_(arrived.to(value.device)[:, None, None], 0))
    if not counted or (born is None and not bool(arrived.any())):
        return
    if born is None:
        state["born"] = born = torch.zeros(count, dtype=torch.float32, device=parameter.device)
    now = state["step"].to(born.device, torch.float32)
    born.copy_(torch.where(arrived.to(born.device), now, born[earlier.to(born.device)]))


def check_parameter(parameter: Tensor, over_blocks: bool) -> None:
    """Raise ArgumentError for a parameter that no kernel can step, or that a rule over blocks cannot."""
    if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
        raise ArgumentError(
            f"A parameter is a {type(parameter).__name__}, whose values lie elsewhere; step it with torch's own "
            "optimizer."
        )
    if parameter.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ArgumentError(f"A parameter holds {parameter.dtype} values; give those of {known} only.")
    if over_blocks and (parameter.dim() != 3 or parameter.shape[1] != parameter.shape[2]):
        raise ArgumentError(
            f"A parameter of shape {tuple(parameter.shape)} holds no square blocks [n, b, b]; put it into a param "
            "group of its own with a rule for elements, such as {'params': [...], 'rule': 'adamw'}."
        )
