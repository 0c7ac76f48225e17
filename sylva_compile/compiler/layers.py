"""Compile the layers of a model in place, one by one, so that they share one compiled graph."""

from collections.abc import Callable
from typing import Any

from torch import nn

from sylva_compile.blocks.compile_units import compile_units
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import EmbedError


def compile_layers(model: nn.Module, backend: str | Callable[..., Any], **options: Any) -> int:
    """Compile, in place, each layer of `model` that holds trained blocks; the rest of the model stays uncompiled.

    Layers run the same code, so they share compiled graphs, and compiling costs about as much as one layer does. A
    model without a list of layers is compiled whole, in place.

    Args:
        model: a model whose weights carry blocks; `backend(masks)` and `masks.embed(model)` put them there.
        backend: the backend of every layer: `sylva_compile.backend(masks)`, or "sylva".
        **options: further arguments of `torch.compile`.

    Returns:
        The number of modules that are compiled, each of them in place.

    Raises:
        EmbedError: the model carries no blocks.
    """
    model = unwrap(model)
    states = block_states(model)
    if not states:
        raise EmbedError("The model carries no blocks; call masks.embed(model) first.")
    units = compile_units(model, (state.weight for state in states.values())) or [model]
    for unit in units:
        unit.compile(backend=backend, **options)
    return len(units)
