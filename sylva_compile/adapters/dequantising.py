"""Make ordinary linear layers of quantised ones that carried blocks: `merge_and_unload(model, dequantise=True)`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.quantised_state import QuantisedState
from sylva_compile.errors import AdapterError
from sylva_compile.quantised.registry import format_of


def check_may_merge(states: Mapping[str, BlockState], *, dequantise: bool) -> None:
    """Raise AdapterError where trained values would have to go into a packed weight."""
    name = next((name for name, state in states.items() if state.is_quantised), None)
    if name is not None and not dequantise:
        raise AdapterError(
            f"{name} is quantised, and quantising it again would change the trained blocks by more than training did; "
            "use save_adapter, or merge_and_unload(model, dequantise=True), which makes its layer a dense one."
        )


def trained_weights(model: nn.Module, states: Mapping[str, BlockState]) -> dict[nn.Module, Tensor]:
    """Return the trained weight `[m, n]` of every quantised module that carries blocks; shared ones are one tensor."""
    found: dict[nn.Module, Tensor] = {}
    for state in states.values():
        if isinstance(state, QuantisedState):
            state.check_enabled()
            dense = state.trained_dense()
            if not state.format.knows_dtype:
                dense = dense.to(_dtype_beside(model, states))
            found |= {module: dense for module, _ in state.owners()}
    return found


def make_dense(model: nn.Module, weights: Mapping[nn.Module, Tensor]) -> None:
    """Let each module of `weights`, whose blocks have left it, be an `nn.Linear` with its dense weight, frozen."""
    parameters: dict[int, nn.Parameter] = {}
    for module, dense in weights.items():
        plain = nn.Linear(1, 1, bias=False, device="meta")
        module.__class__ = nn.Linear
        for name in vars(module).keys() - vars(plain).keys():
            if name != "training" and not name.startswith("_") and name not in ("in_features", "out_features"):
                del module.__dict__[name]
        # Loading into a dense layer needs nothing of what the package did for its packed one.
        module._load_state_dict_pre_hooks.clear()
        parameter = parameters.setdefault(id(dense), nn.Parameter(dense, requires_grad=False))
        module._parameters = {"weight": parameter, "bias": _cast(module._parameters.get("bias"), dense.dtype)}
    if weights and not any(format_of(parameter) is not None for parameter in model.parameters()):
        _forget_quantiser(model)


def _cast(bias: Any, dtype: torch.dtype) -> Any:
    """Return the bias in the dtype of its new weight."""
    if bias is not None and bias.dtype != dtype:
        bias.data = bias.data.to(dtype)
    return bias


def _dtype_beside(model: nn.Module, states: Mapping[str, BlockState]) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter that is no block; float32 if it has none."""
    blocks = {id(state.blocks) for state in states.values()}
    others = (each.dtype for each in model.parameters() if id(each) not in blocks and each.is_floating_point())
    return next(others, torch.float32)


def _forget_quantiser(model: nn.Module) -> None:
    """Let a model of transformers know that nothing of it is quantised any more, as its own `dequantize` does."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    # A packed checkpoint was read by operations that cannot write; save_pretrained would try to turn them around.
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [each for each in conversions if _can_be_turned_around(each)]  # type: ignore[assignment]
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, flag, False):
            setattr(model, flag, False)


def _can_be_turned_around(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
