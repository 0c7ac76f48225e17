"""The stacked weights of experts: which parameters they are, how they are stored, and which of them are refused.

transformers 5 keeps the experts of a layer in one module with a Parameter `[E, m, n]` for each product. Blocks see it
as the matrix `[E·m, n]`. The sampled gradient is known for `experts_implementation="grouped_mm"`, where one product
serves all experts and no step waits for the device, and for the batched product of Llama 4.
"""

from torch import Tensor, nn

from sylva_compile.errors import ScopeError

_OWN_CLASSES = {
    "JetMoeParallelExperts": "JetMoE multiplies one expert after another in a loop",
    "DbrxExpertGLU": "DBRX keeps its experts in one matrix and reads slices of it",
    "DbrxExperts": "DBRX keeps its experts in one matrix and reads slices of it",
}
"""Classes of experts that blocks cannot follow, each with the reason."""

_BATCHED = "Llama4TextExperts"
"""The class whose experts all get equally many tokens, in one batched product; its weights are stored transposed."""

_ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Names that models of transformers give to the layer that chooses experts, beside the experts."""


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds stacked weights of experts as transformers 5 keeps them."""
    # The decorator `use_experts_implementation` sets both attributes.
    return {"is_transposed", "_is_expert_parallel"} <= module.__dict__.keys() or _is_batched(module)


def stacked_weights(module: nn.Module) -> list[str]:
    """Return the attributes of `module` that hold stacked weights `[E, m, n]`; none unless `is_experts(module)`."""
    if not is_experts(module):
        return []
    return [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() == 3]


def stacked_input_axis(module: nn.Module) -> int:
    """Return the axis of an expert's own matrix `[m, n]` that inputs meet: 0 where experts are stored transposed."""
    return 0 if _is_batched(module) or module.is_transposed else 1


def holds_refused_experts(module: nn.Module) -> bool:
    """Whether `module` is one of the known classes of experts that cannot carry blocks."""
    return _class_among(module, _OWN_CLASSES) is not None


def is_router(name: str, experts: list[str]) -> bool:
    """Whether the layer `name` chooses experts: it stands beside one of the modules `experts`, by its name."""
    for other in experts:
        prefix = other.rpartition(".")[0]
        inside = name.removeprefix(prefix + ".") if prefix else name
        if (not prefix or name.startswith(prefix + ".")) and inside.split(".")[0] in _ROUTERS:
            return True
    return False


def check_experts(name: str, module: nn.Module) -> None:
    """Raise ScopeError unless blocks can follow the stacked weight `name` of `module`, or its layers in a loop."""
    own = _class_among(module, _OWN_CLASSES)
    if own is not None:
        raise ScopeError(
            f"{name}: {_OWN_CLASSES[own]}, so its experts cannot carry blocks; name the layers to train in the scope, "
            "as scope=['q_proj', 'v_proj']."
        )
    if not is_experts(module):
        raise ScopeError(
            f"{name} has 3 dimensions and belongs to a {type(module).__name__}; blocks sit in matrices and in the "
            "stacked experts of transformers, so leave it out of scope."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ScopeError(
            f"{name} is split by expert parallelism, and blocks cannot follow; load the model without it, or leave "
            "its experts out of the scope."
        )
    if _is_batched(module):
        return
    used = getattr(module.config, "_experts_implementation", None)
    if used != "grouped_mm":
        raise ScopeError(
            f"{name}: its experts run as {used!r}, whose gradients blocks cannot be sampled from; call "
            "model.set_experts_implementation('grouped_mm'), or load with experts_implementation='grouped_mm'."
        )


def check_stacked(name: str, weight: Tensor) -> None:
    """Raise ScopeError unless the stacked weight `[E, m, n]` lies in one piece on this process."""
    if not weight.is_contiguous():
        raise ScopeError(f"{name} does not lie in one piece in memory; assign weight.contiguous() to it first.")


def _is_batched(module: nn.Module) -> bool:
    return _class_among(module, (_BATCHED,)) is not None


def _class_among(module: nn.Module, names: object) -> str | None:
    """Return the name of a class of `module`, or of a class that it inherits from, that is among `names`."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in names), None)  # type: ignore[operator]
