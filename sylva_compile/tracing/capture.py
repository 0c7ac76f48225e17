"""The stage 1 backend: compiled graphs whose weight gradients show their operands instead of multiplying them.

No module hooks: what is seen is what the joint graph of forward and backward computes, whatever Python made it.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import remove_from_cache
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch.fx import GraphModule, Node

from sylva_compile.compiler.aot import compile_eagerly
from sylva_compile.passes.observe_weight_gradients import observe_weight_gradients_pass
from sylva_compile.passes.runner import run_passes

Missed = Callable[[Tensor, str], None]
"""Called with a weight whose gradient could not be observed in some graph, and the reason."""


def capture_backend(missed: Missed) -> Callable[..., Any]:
    """A backend for `torch.compile` that sends weight gradients' operands to `kernels.observe`'s listeners."""

    def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        def given(placeholder: Node) -> Any:
            desc = placeholder.meta.get("desc")
            return example_inputs[desc.idx] if isinstance(desc, PlainAOTInput) else None

        def is_weight(placeholder: Node) -> bool:
            # After a graph break activations are inputs too, and the layers before need their gradients.
            return isinstance(given(placeholder), nn.Parameter)

        def note(placeholder: Node, reason: str) -> None:
            missed(given(placeholder), reason)

        observe = partial(observe_weight_gradients_pass, is_weight=is_weight, missed=note)
        # A graph from AOTAutograd's cache would come without the pass that makes it observable.
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_eagerly(
                gm, example_inputs, partial(run_passes, passes={"observe_weight_gradients": observe})
            )

    return compile_graph


@contextmanager
def compilations_forgotten() -> Iterator[None]:
    """Let Dynamo compile freely inside, and drop what it compiled afterwards.

    A model that is traced and then compiled for training would otherwise carry the trace's entries in its cache,
    where they cost guard checks and count towards the limit of recompilations.
    """
    compiled: set[types.CodeType] = set()

    def remember(code: types.CodeType, new_code: types.CodeType) -> None:
        compiled.add(code)

    handle = register_bytecode_hook(remember)
    try:
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            yield
    finally:
        handle.remove()
        for code in compiled:
            remove_from_cache(code)
