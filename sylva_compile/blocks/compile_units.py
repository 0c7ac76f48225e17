"""The modules of a model that are compiled one by one: its layers, which then share one compiled graph."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from sylva_compile.blocks.scope import owners_of


def compile_units(model: nn.Module, weights: Iterable[Tensor]) -> list[nn.Module] | None:
    """Return modules that hold `weights` and can be compiled one by one, or None to compile the model whole.

    Units are the members of the outermost lists of modules (`model.layers` of a Llama), and for weights outside of
    these the outermost modules that hold no such list. Members of one list mostly run the same code, which is then
    compiled once for all of them, however deep the model is.

    Args:
        model: the model.
        weights: the weights whose gradients compiled code shall compute, each a parameter of the model.

    Returns:
        The units, each once, in the order of the model; None if no weight is in a list of modules, or one is in no
        module that can be a unit.
    """
    units = dict(_units(model))
    # Units may share a module.
    units_of: dict[nn.Module, list[nn.Module]] = {}
    for unit in units:
        for module in unit.modules():
            units_of.setdefault(module, []).append(unit)
    found: dict[nn.Module, None] = {}
    for weight in weights:
        for owner, _ in owners_of(model, weight):
            if owner not in units_of:
                return None
            found |= dict.fromkeys(units_of[owner])
    order = {module: at for at, module in enumerate(model.modules())}
    return sorted(found, key=order.__getitem__) if any(units[unit] for unit in found) else None


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield the modules below `module` that can be units, each with whether it is a member of a list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_has_code, child)):
            yield from ((member, True) for member in child)
        elif _has_code(child) and not any(is_member for _, is_member in _units(child)):
            yield child, False
        else:
            yield from _units(child)


def _has_code(module: nn.Module) -> bool:
    # Dynamo does not compile torch's own `forward` where it is called from uncompiled code.
    return not type(module).forward.__module__.startswith("torch.nn.")


def caching_configurations(model: nn.Module) -> list[Any]:
    """Return the configurations, each once, that let transformers make a key-value cache in every forward pass.

    With a cache, each layer would need a compiled graph of its own. A model may have several configurations: that of a
    language model within it, or within a wrapper.
    """
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if getattr(config, "use_cache", False)}.values())
