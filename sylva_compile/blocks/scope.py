"""The weights of a model that a scope names: patterns, wrapped models, shared parameters, weights without blocks."""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sylva_compile._torch import is_traceable_wrapper_subclass
from sylva_compile.blocks.experts import (
    check_experts,
    check_stacked,
    holds_refused_experts,
    is_experts,
    is_router,
    stacked_input_axis,
    stacked_weights,
)
from sylva_compile.blocks.partitioned import check_not_parallelized, check_not_partitioned
from sylva_compile.blocks.refused_modules import check_no_refused
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.config import Scope
from sylva_compile.errors import ScopeError
from sylva_compile.quantised.registry import format_of, refusal_text, refused_format

log = logging.getLogger(__name__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's Conv1D, a linear layer that stores its weight transposed."""
    # A module of that class exists only once transformers is imported, which this library does not need.
    source = sys.modules.get("transformers.pytorch_utils")
    return source is not None and isinstance(module, source.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer whose weight can carry blocks: nn.Linear or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def layer_numbers(name: str) -> tuple[str, ...]:
    """Return the numbers among the parts of a weight's name, which tell its layer: ("3",) for "layers.3.mlp.weight"."""
    return tuple(part for part in name.split(".") if part.isdecimal())


def plain_name(name: str) -> str:
    """Return a module or parameter name without the parts that wrappers of modules put into it.

    They are those of `torch.compile` and of torch's checkpoint wrapper.
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter by its plain name; shared ones under each of their names."""
    return {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters(remove_duplicate=False)}


def input_axis(module: nn.Module) -> int:
    """Return the axis of the stored weight that the layer's inputs meet: 0 for GPT-2's transposed Conv1D, else 1.

    For stacked experts it is that of each expert's own matrix.
    """
    if is_experts(module):
        return stacked_input_axis(module)
    return 0 if is_conv1d(module) else 1


def owners_of(model: nn.Module, weight: Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Yield every `(module, attribute)` that holds `weight`; a shared weight has several."""
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is weight:
                yield module, attribute


def check_owners(model: nn.Module, name: str, weight: Tensor) -> None:
    """Raise ScopeError if blocks cannot follow what a module of `model` does with `weight`, its parameter `name`.

    That is so where DeepSpeed or tensor parallelism splits it, and for stacked weights of some experts.
    """
    check_not_partitioned(name, weight)
    for module, _ in owners_of(model, weight):
        check_not_parallelized(name, module)
        if weight.dim() == 3:
            check_experts(name, module)


_ADAPTERS = {"lora_A", "lora_B"}
"""Names that PEFT gives to the small layers that it puts beside a layer."""

_CLASSIFIERS = ("score", "classifier", "qa_outputs")
"""Names that models of transformers give to the head of a classifier."""


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the language-model head or the classifier of a model of transformers; None for other models."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except (AttributeError, NotImplementedError):
        # Encoders without a language-model head raise these.
        head = None
    heads = (head, *(getattr(model, name, None) for name in _CLASSIFIERS))
    return next((head for head in heads if isinstance(head, nn.Module)), None)


class _Candidate(NamedTuple):
    """A weight that a scope may name, by any of `names`; it is the parameter `full`, `attribute` of `module`."""

    full: str
    module: nn.Module
    attribute: str
    names: tuple[str, ...]


def _candidates(model: nn.Module, experts: bool) -> Iterator[_Candidate]:
    """Yield the weights of `model` that can carry blocks, or that a scope is told about, in the model's order."""
    for name, module in model.named_modules():
        name = plain_name(name)
        prefix = f"{name}." if name else ""
        if is_linear(module):
            yield _Candidate(f"{prefix}weight", module, "weight", (name,))
        elif experts and holds_refused_experts(module):
            held = next(iter(module._parameters), "weight")
            yield _Candidate(prefix + held, module, held, (name,))
        elif experts:
            for attribute in stacked_weights(module):
                yield _Candidate(prefix + attribute, module, attribute, (prefix + attribute, name))


def _is_named(candidate: _Candidate, ending: str) -> bool:
    return any(_ends_in((ending,), name) for name in candidate.names)


def weights_in_scope(model: nn.Module, scope: Scope, *, experts: bool = True) -> dict[str, nn.Parameter]:
    """Return the weights that `scope` names, by full parameter name, in the model's order; shared weights once.

    Stacked weights of experts go by the name of their module and by their own ("mlp.experts.gate_up_proj"). The layers
    that choose experts are no part of "all-linear".

    Args:
        model: the model.
        scope: as in SylvaConfig.
        experts: whether stacked weights of experts may be in scope.

    Raises:
        ScopeError: nothing matches, or a match cannot carry blocks (meta device, quantised, integer, made under
            `torch.inference_mode()`).
    """
    model = unwrap(model)
    head = output_head(model)
    layers = list(_candidates(model, experts))
    in_scope: Callable[[str], bool] | None = None
    if scope == "all-linear":
        inside = set() if head is None else set(head.modules())
        stacks = [plain_name(name) for name, module in model.named_modules() if is_experts(module)]
        chosen = [
            each
            for each in layers
            if each.module not in inside
            and not _ADAPTERS & set(each.full.split("."))
            and not is_router(each.names[0], stacks)
        ]
    elif isinstance(scope, str):
        try:
            pattern = re.compile(scope)
        except re.error as error:
            raise ScopeError(
                f"scope={scope!r} is no regular expression ({error}); mend it or use 'all-linear'."
            ) from None
        in_scope = partial(_matches, pattern)
        chosen = [each for each in layers if any(map(in_scope, each.names))]
    else:
        endings = tuple(scope)
        in_scope = partial(_ends_in, endings)
        chosen = [each for each in layers if any(map(in_scope, each.names))]
        unmatched = [ending for ending in endings if not any(_is_named(each, ending) for each in layers)]
        if chosen and unmatched:
            log.warning("scope: no Linear or Conv1D has a name that ends in %s; the other endings are used.", unmatched)
    others = ((plain_name(name), m) for name, m in model.named_modules() if not is_linear(m))
    check_no_refused(others, in_scope, found_others=bool(chosen))
    if not chosen:
        shown = scope if isinstance(scope, str) else list(scope)
        raise ScopeError(f"scope={shown!r} matches no Linear or Conv1D; {_hint(scope, layers)}.")
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for full, module, attribute, _ in chosen:
        if attribute != "weight" or holds_refused_experts(module):
            check_experts(full, module)
        weight = module._parameters.get(attribute)
        check_weight(full, weight)
        check_not_parallelized(full, module)
        assert weight is not None
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[full] = weight
    return weights


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name) is not None


def _ends_in(endings: Sequence[str], name: str) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def _hint(scope: Scope, layers: Sequence[_Candidate]) -> str:
    """Return advice for a scope that matches nothing."""
    if not layers:
        return "the model has none (is it quantised?), so load it unquantised or make masks with Masks.from_block_maps"
    if isinstance(scope, str) and any(_is_named(each, scope) for each in layers):
        return f"a string is a regular expression for the whole name, so use [{scope!r}] for names that end so"
    some = ", ".join(each.names[0] for each in layers[:3])
    return f"name some of the model's {len(layers)} (such as {some}), or use 'all-linear'"


def check_weight(name: str, weight: Tensor | None) -> None:
    """Raise ScopeError unless autograd can follow `weight`, a matrix or stacked experts of floating-point values."""
    check_not_partitioned(name, weight)
    if _is_usable_quantised(name, weight):
        return
    if not isinstance(weight, nn.Parameter) or (is_traceable_wrapper_subclass(weight) and not is_sharded(weight)):
        kind = "" if weight is None else f" but a {type(weight.data).__name__}"
        raise ScopeError(
            f"{name} is no plain Parameter{kind} (quantised?); load the model unquantised, or leave it out of scope."
        )
    if weight.is_inference():
        raise ScopeError(
            f"{name} was made under torch.inference_mode(), where nothing can be trained; load the model outside of it."
        )
    if weight.device.type == "meta":
        raise ScopeError(f"{name} is on the meta device; load the weights before masking or embedding.")
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ScopeError(f"{name} holds {weight.dtype} values (quantised?); dequantise it or leave it out of scope.")
    if weight.dim() == 3 and not is_sharded(weight):
        check_stacked(name, weight)
    elif weight.dim() == 3:
        raise ScopeError(
            f"{name}: blocks cannot follow experts that fully_shard splits; embed the blocks first and name the weight "
            "among the ignored_params of fully_shard, or leave it out of scope."
        )
    elif weight.dim() != 2:
        raise ScopeError(f"{name} has {weight.dim()} dimensions; blocks sit in matrices, so leave it out of scope.")


def _is_usable_quantised(name: str, weight: Any) -> bool:
    """Whether `weight` is quantised in a format that blocks train in. Raises ScopeError where it cannot be used."""
    found = format_of(weight)
    if found is None:
        if (kind := refused_format(weight)) is not None:
            raise ScopeError(refusal_text(name, kind))
        return False
    if (why := found.refusal(weight)) is not None:
        raise ScopeError(f"{name} {why}.")
    if weight.device.type == "meta":
        raise ScopeError(f"{name} is on the meta device; load the weights before masking or embedding.")
    return True
