"""Checks of what a Trainer is about to do with a model that carries blocks."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError


def check_compiled_once(values: Iterable[Any]) -> None:
    """Raise ArgumentError where TrainingArguments among `values` let accelerate compile a model among them.

    Accelerate has a closed list of backends, without "sylva", and compiles a model again that was compiled in place.
    """
    values = list(values)
    asked = next((value for value in values if getattr(value, "torch_compile", False) is True), None)
    if asked is None:
        return
    backend = getattr(asked, "torch_compile_backend", None)
    models = [unwrap(value) for value in values if isinstance(value, nn.Module)]
    in_place = any(getattr(model, "_compiled_call_impl", None) is not None for model in models)
    if backend == "sylva" or in_place or any(map(block_states, models)):
        beside = "the model is compiled in place already" if in_place else "accelerate does not know blocks"
        raise ArgumentError(
            f"TrainingArguments(torch_compile=True, torch_compile_backend={backend!r}): {beside}; leave both out and "
            "call model.compile(backend=sylva_compile.backend(masks)) before making the Trainer."
        )


def check_reference(args: Any, model: nn.Module, reference: nn.Module | None) -> None:
    """Raise ArgumentError where TRL would mix the parameters of `model` into a reference that has others."""
    if not getattr(args, "sync_ref_model", False) or reference is None:
        return
    if len(list(unwrap(model).parameters())) != len(list(unwrap(reference).parameters())):
        raise ArgumentError(
            "sync_ref_model=True mixes parameters one by one, and the reference model has no blocks; leave it out, or "
            "give ref_model=copy.deepcopy(model)."
        )
