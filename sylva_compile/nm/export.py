"""Dense and semi-structured weights of a pruned model, for other libraries, and the dense model again."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.nm.adapters import pruned_modules
from sylva_compile.nm.embedding import unembed
from sylva_compile.nm.low_rank import LEFT, RIGHT
from sylva_compile.nm.module import dense_left, dense_weight

Form = Literal["dense", "semi-structured"]


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """Return the dense weight of a pruned module as its base class stores it, with its adapter added."""
    weight: Tensor = dense_weight(module)
    low_rank, layout = module._nm_low_rank, module._nm_layout
    if low_rank is None:
        return weight
    right = module._parameters[RIGHT].detach()
    # L Rt is [in, out], as Conv1D stores weights.
    change = dense_left(module).to(right.dtype) @ right / low_rank.rank
    merged: Tensor = weight.to(right.dtype) + (change.t() if layout.input_axis == 1 else change)
    return merged.to(weight.dtype)


def unprune(model: nn.Module) -> nn.Module:
    """Make an ordinary dense model of a pruned one, in place: kept values, zeros, and adapters added to the weights.

    Returns:
        The model, with ordinary modules. Weights that had an adapter have no zeros any more.

    Raises:
        EmbedError: the model has no pruned weights.
    """
    unembed(model, {name: merged_weight(module) for name, module in pruned_modules(model).items()})
    return model


def export_pruned(model: nn.Module, form: Form = "dense") -> dict[str, Any]:
    """Return a state dict that models without this library load.

    Args:
        model: a pruned model.
        form: "dense": dense weights with zeros; adapters are added to them, which fills the zeros.
            "semi-structured": torch's `SparseSemiStructuredTensor` for each pruned weight; for 2:4, bfloat16 or
            float16, on a GPU, and without adapters. Load it with `load_state_dict(..., assign=True)`.

    Returns:
        Values by name, as of the model before it was pruned.

    Raises:
        ArgumentError: the form is unknown.
        EmbedError: the model has no pruned weights, or torch has no semi-structured form of one.
    """
    if form not in get_args(Form):
        raise ArgumentError(f"form={form!r}; use 'dense' or 'semi-structured'.")
    modules = pruned_modules(model)
    if form == "semi-structured":
        for name, module in modules.items():
            _check_semi_structured(name, module)
    found: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    weights = {module._nm_layout: merged_weight(module) for module in modules.values()}
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        if "_nm_layout" in module.__dict__:
            path = f"{prefix}." if prefix else ""
            weight = weights[module._nm_layout]
            replaced[path + "weight"] = weight if form == "dense" else torch.sparse.to_sparse_semi_structured(weight)
            replaced |= {path + LEFT: None, path + RIGHT: None}
    for name, value in unwrap(model).state_dict().items():
        if replaced.get(name, value) is not None:
            found[name] = replaced.get(name, value)
    return found


def _check_semi_structured(name: str, module: Any) -> None:
    layout = module._nm_layout
    here = f"{name} ({layout.n}:{layout.m}, {layout.dtype}, {layout.codes.device.type})"
    fits = (layout.n, layout.m) in ((2, 4), (1, 2)) and layout.dtype in (torch.bfloat16, torch.float16)
    if not fits or layout.codes.device.type != "cuda" or layout.input_axis != 1:
        raise EmbedError(
            f"{here}: torch has semi-structured tensors of 2:4, in bfloat16 and float16, for Linear on a GPU; export "
            "form='dense'."
        )
    if module._nm_low_rank is not None:
        raise EmbedError(f"{name} has an adapter, which would fill the zeros; export form='dense'.")
