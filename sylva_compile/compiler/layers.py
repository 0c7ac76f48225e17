"""Compile the layers of a model in place, one by one, so that they share one compiled graph."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sylva_compile._torch import compiled_call, set_compiled_call, uncompiled_call
from sylva_compile.blocks.compile_units import caching_configurations, compile_units
from sylva_compile.blocks.scope import unwrap
from sylva_compile.compiler.kinds import KINDS
from sylva_compile.errors import EmbedError

log = logging.getLogger(__name__)


def compile_layers(model: nn.Module, backend: str | Callable[..., Any], **options: Any) -> int:
    """Compile, in place, each layer of `model` that holds trained blocks or pruned weights; the rest stays uncompiled.

    Layers run the same code, so they share compiled graphs, and compiling costs about as much as one layer does. A
    model without a list of layers is compiled whole, in place.

    A key-value cache of transformers would need a graph for every layer. So the model's configuration gets
    `use_cache=False`, and calls with a cache, as `generate` makes them, run uncompiled. A model that calls parts of its
    layers and not the layers themselves needs `model.compile`; `backend.report()` tells.

    Args:
        model: a model whose weights carry blocks or are pruned; `backend(masks)` and `masks.embed(model)` see to that.
        backend: the backend of every layer: `sylva_compile.backend(masks)`, or "sylva".
        **options: further arguments of `torch.compile`.

    Returns:
        The number of modules that are compiled.

    Raises:
        EmbedError: the model carries no blocks and no pruned weights.
    """
    model = unwrap(model)
    weights = [weight for kind in KINDS for weight in kind.carriers(model).values()]
    if not weights:
        raise EmbedError("The model carries no blocks; call masks.embed(model) first.")
    units = compile_units(model, weights) or [model]
    for config in caching_configurations(model):
        log.info("The model's use_cache is off now: each layer's cache would need a compiled graph of its own.")
        config.use_cache = False
    for unit in units:
        unit.compile(backend=backend, **options)
        if unit is not model:
            set_compiled_call(unit, _without_cache(compiled_call(unit), uncompiled_call(unit)))
    return len(units)


def _without_cache(compiled: Callable[..., Any], uncompiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that is `uncompiled` where it gets a key-value cache."""

    def call(*args: Any, **kwargs: Any) -> Any:
        # A cache exists only once transformers is imported, which this library does not need.
        caches = sys.modules.get("transformers.cache_utils")
        if caches is not None and any(isinstance(value, caches.Cache) for value in (*args, *kwargs.values())):
            if torch.is_grad_enabled():
                _warn_of_cache()
            return uncompiled(*args, **kwargs)
        return compiled(*args, **kwargs)

    return call


@functools.cache
def _warn_of_cache() -> None:
    log.warning(
        "A compiled layer got a key-value cache with gradients on, and runs uncompiled, with dense weight gradients; "
        "call the model with use_cache=False, or under torch.no_grad()."
    )
