"""The backend that traces: its graphs pass the operands of every weight gradient to listeners and skip the product.

It uses no module hooks. It reads the joint graph of forward and backward, so it finds every weight gradient there,
whichever Python code computes the forward pass.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sylva_compile._torch import (
    PlainAOTInput,
    compiled_call,
    dynamo_config,
    functorch_config,
    register_bytecode_hook,
    remove_from_cache,
    set_compiled_call,
)
from sylva_compile.blocks.compile_units import compile_units
from sylva_compile.compiler.aot import compile_eagerly
from sylva_compile.passes.observe_probes import observe_probes_pass
from sylva_compile.passes.observe_weight_gradients import observe_weight_gradients_pass
from sylva_compile.passes.runner import run_passes

Missed = Callable[[Tensor, str], None]
"""A call is `missed(weight, reason)`, for a weight whose gradient could not be observed in some graph."""


def capture_backend(missed: Missed) -> Callable[..., Any]:
    """Return a `torch.compile` backend that passes weight gradients' operands to the listeners of `kernels.observe`."""

    def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        def given(placeholder: Node) -> Any:
            desc = placeholder.meta.get("desc")
            return example_inputs[desc.idx] if isinstance(desc, PlainAOTInput) else None

        def is_weight(placeholder: Node) -> bool:
            # After a graph break activations are inputs with gradients too; they are no weights.
            return isinstance(given(placeholder), nn.Parameter)

        def note(placeholder: Node, reason: str) -> None:
            missed(given(placeholder), reason)

        def note_of_probe(probe: Node, reason: str) -> None:
            if is_weight(probe):
                note(probe, reason)

        passes = {
            "observe_weight_gradients": partial(observe_weight_gradients_pass, is_weight=is_weight, missed=note),
            "observe_probes": partial(observe_probes_pass, missed=note_of_probe),
        }
        # A graph from AOTAutograd's cache would lack the calls of `sylva::observe` that the pass inserts.
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_eagerly(gm, example_inputs, partial(run_passes, passes=passes))

    return compile_graph


def compile_layers_or_model(
    model: nn.Module, weights: Iterable[nn.Parameter], backend: Callable[..., Any]
) -> tuple[nn.Module, set[nn.Module]]:
    """Compile the layers of `model` in place, so that they share one graph, or else the model.

    Returns:
        The module to call, and the layers that nobody has called yet; calls take them out of the set.
    """
    units = compile_units(model, weights)
    if units is None:
        return torch.compile(model, backend=backend), set()  # type: ignore[return-value]
    waiting = set(units)

    def noted(unit: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            waiting.discard(unit)
            return call(*args, **kwargs)

        return run

    for unit in units:
        unit.compile(backend=backend)
        set_compiled_call(unit, noted(unit, compiled_call(unit)))
    return model, waiting


@contextmanager
def compilations_forgotten() -> Iterator[None]:
    """Raise Dynamo's limits of recompilation inside the block, and remove its new cache entries afterwards.

    Otherwise a model that is traced and then compiled for training would keep the trace's entries in Dynamo's cache,
    where they cost guard checks and count towards the limit of recompilations.
    """
    compiled: set[types.CodeType] = set()

    def remember(code: types.CodeType, new_code: types.CodeType) -> None:
        compiled.add(code)

    handle = register_bytecode_hook(remember)
    try:
        with dynamo_config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            yield
    finally:
        handle.remove()
        for code in compiled:
            remove_from_cache(code)
