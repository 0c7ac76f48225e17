"""Compile a model that `fully_shard` has split, for a trace: its layers, and linear modules outside of them.

Dynamo does not compile across the hooks by which `fully_shard` gathers weights. So where layers do not hold all
weights, the rest of the model is not compiled with them: its linear modules are compiled one by one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sylva_compile._torch import set_compiled_call
from sylva_compile.blocks.compile_units import compile_units
from sylva_compile.blocks.scope import owners_of
from sylva_compile.tracing.capture import compile_layers_or_model


class CompiledParts:
    """The compiled parts of a model."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], backend: Callable[..., Any], stack: ExitStack
    ) -> None:
        """Compile layers of `model`, and modules with `weights` outside of them; leaving `stack` takes both back."""
        self._model, self._backend, self._stack = model, backend, stack
        # Found now: during passes the modules hold gathered weights.
        self._owners = {name: [owner for owner, _ in owners_of(model, weight)] for name, weight in weights.items()}
        inside = _in_layers(model, weights)
        self._uncalled: set[nn.Module] = set()
        if inside:
            _, self._uncalled = compile_layers_or_model(model, inside.values(), backend)
        self._compile_owners(weights.keys() - inside.keys())

    @property
    def left_out(self) -> bool:
        """Whether a pass has not called some of the layers, but their parts."""
        return bool(self._uncalled)

    def without_layers(self) -> None:
        """Compile all modules with weights one by one instead of layers."""
        self._uncalled.clear()
        for module in self._model.modules():
            set_compiled_call(module, None)
        self._compile_owners(self._owners)

    def _compile_owners(self, names: Collection[str]) -> None:
        for owner in {owner: None for name, owners in self._owners.items() if name in names for owner in owners}:
            self._stack.enter_context(_compiled_forward(owner, self._backend))


def _in_layers(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of `weights` that lie in modules which can be compiled one by one; none without a list of layers."""
    if compile_units(model, weights.values()) is not None:
        return dict(weights)
    members = [weight for weight in weights.values() if compile_units(model, [weight]) is not None]
    return {
        name: weight
        for name, weight in weights.items()
        if members and compile_units(model, [*members, weight]) is not None
    }


@contextmanager
def _compiled_forward(module: nn.Module, backend: Callable[..., Any]) -> Iterator[None]:
    """Compile the `forward` of `module` alone: its hooks, which may be those of `fully_shard`, stay outside."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    forward = module.forward

    # Dynamo does not compile torch's own `forward` where uncompiled code calls it.
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(module)["forward"] = torch.compile(call, backend=backend)
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)
