"""Which weights of a model are meant: scope patterns, wrapped models, shared parameters, odd weights."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from sylva_compile.errors import ScopeError

log = logging.getLogger(__name__)

Scope = str | Sequence[str]
"""`"all-linear"`, a regular expression for the whole module name, or a list of module-name endings."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def plain_name(name: str) -> str:
    """A module or parameter name without the steps that `torch.compile`'s wrapper puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its plain name; shared ones under each of their names."""
    return {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters(remove_duplicate=False)}


def input_axis(module: nn.Module) -> int:
    """The axis of the stored weight that the layer's inputs meet: 0 for GPT-2's transposed Conv1D, else 1."""
    return 0 if isinstance(module, Conv1D) else 1


def owners_of(model: nn.Module, weight: Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Every `(module, attribute)` that holds `weight`; shared weights have several."""
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is weight:
                yield module, attribute


def input_axes(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each of `weights`, by name, the axis that its layer's inputs meet."""
    return {name: input_axis(next(iter(owners_of(model, weight)))[0]) for name, weight in weights.items()}


_ADAPTERS = {"lora_A", "lora_B"}
"""What PEFT calls the small layers that it puts beside a layer."""

_CLASSIFIERS = ("score", "classifier", "qa_outputs")
"""What the models of transformers call the head of a classifier."""


def _output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head or the classifier of a model of transformers; None of others."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except (AttributeError, NotImplementedError):
        # Encoders without a language-model head answer this way.
        head = None
    heads = (head, *(getattr(model, name, None) for name in _CLASSIFIERS))
    return next((head for head in heads if isinstance(head, nn.Module)), None)


def weights_in_scope(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """The weights that `scope` names, by full parameter name, in the model's order; shared weights once.

    Raises:
        ScopeError: nothing matches, or a match cannot carry blocks (meta device, quantised, integer).
    """
    model = unwrap(model)
    head = _output_head(model)
    layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if scope == "all-linear":
        inside = set() if head is None else set(head.modules())
        chosen = {n: m for n, m in layers.items() if m not in inside and not _ADAPTERS & set(n.split("."))}
    elif isinstance(scope, str):
        try:
            pattern = re.compile(scope)
        except re.error as error:
            raise ScopeError(
                f"scope={scope!r} is no regular expression ({error}); mend it or use 'all-linear'."
            ) from None
        chosen = {name: module for name, module in layers.items() if pattern.fullmatch(name)}
    else:
        endings = tuple(scope)
        found = {e: {n: m for n, m in layers.items() if n == e or n.endswith("." + e)} for e in endings}
        chosen = {n: m for n, m in layers.items() if any(n in some for some in found.values())}
        if chosen and (unmatched := [e for e, some in found.items() if not some]):
            log.warning("scope names %s, which no Linear or Conv1D ends in; the others are taken.", unmatched)
    if not chosen:
        raise ScopeError(f"scope={scope!r} matches no Linear or Conv1D; {_hint(scope, list(layers))}.")
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in chosen.items():
        full = f"{name}.weight" if name else "weight"
        weight = module._parameters.get("weight")
        check_weight(full, weight)
        assert weight is not None
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[full] = weight
    return weights


def _hint(scope: Scope, layers: Sequence[str]) -> str:
    """What to do about a scope that matches nothing."""
    if not layers:
        return "the model has none (is it quantised?), so load it unquantised or make masks with Masks.from_block_maps"
    if isinstance(scope, str) and any(name == scope or name.endswith("." + scope) for name in layers):
        return f"a string is a regular expression for the whole name, so use [{scope!r}] for names that end so"
    some = ", ".join(layers[:3])
    return f"name some of the model's {len(layers)} (such as {some}), or use 'all-linear'"


def check_weight(name: str, weight: Tensor | None) -> None:
    """Raise ScopeError unless `weight` is a matrix of real floating-point values in memory."""
    if not isinstance(weight, nn.Parameter) or is_traceable_wrapper_subclass(weight):
        kind = "" if weight is None else f" but a {type(weight.data).__name__}"
        raise ScopeError(
            f"{name} is no plain Parameter{kind} (quantised, or sharded by fully_shard?); load the model unquantised "
            "and unsharded, or leave it out of scope."
        )
    if weight.device.type == "meta":
        raise ScopeError(f"{name} is on the meta device; load the weights before masking or embedding.")
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ScopeError(f"{name} holds {weight.dtype} values (quantised?); dequantise it or leave it out of scope.")
    if weight.dim() != 2:
        raise ScopeError(f"{name} has {weight.dim()} dimensions; blocks sit in matrices, so leave it out of scope.")
