"""`reference_model`: the base of a model as a module of its own, in the same memory."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile._torch import skip_code
from sylva_compile.adapters.disabling import check_embedded, disable_adapter, is_disabled
from sylva_compile.adapters.other_tensors import named_tensors, replaced_tensors
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.errors import EmbedError


def reference_model(model: nn.Module) -> "ReferenceModel":
    """Return the base of `model` as a module that shares all of its memory: a `ref_model` for DPO and its kin.

    A call runs `model`, compiled as it is, inside of `disable_adapter`, without gradients and in evaluation mode, and
    returns its output; then values and modes are as before. A backward pass of `model` that is pending may run
    afterwards.

    With TRL: `DPOTrainer(model, ref_model=reference_model(model), ...)`. `GRPOTrainer` takes no reference model: give
    `trainer.ref_model = reference_model(model)` after it is made, with `beta` above 0. `sync_ref_model=True` raises
    ValueError, since the base cannot follow the model; DeepSpeed and FSDP are not supported.

    Raises:
        AdapterError: the model carries no blocks.
        EmbedError: `fully_shard` splits the model.
    """
    model = unwrap(model)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise EmbedError(
            "fully_shard splits the weights of this model, and a reference model would need them whole; use "
            "disable_adapter(model) around its passes, or load the base as a model of its own."
        )
    check_embedded(block_states(model))
    return ReferenceModel(model)


class ReferenceModel(nn.Module):
    """The base of a model with blocks; made by `reference_model`.

    It has no parameters, buffers or submodules of its own, so that no optimizer, DistributedDataParallel or checkpoint
    finds those of the model twice, and moves or modes of this module do not reach the model. Other attributes are the
    model's; methods of the model (`generate`, `save_pretrained`) run with the base. Modules of the model that are taken
    from here (`reference.lm_head`) are the model's own, with the trained values.
    """

    _sylva_model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        """Refer to `model`, which carries blocks."""
        super().__init__()
        # Past nn.Module, which would register it.
        self.__dict__["_sylva_model"] = model
        self.training = False

    # Not in `forward`: trainers put functions of their own in its place, which call parts of the model.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with the base, without gradients and in evaluation mode.

        Raises:
            AdapterError, EmbedError: see `disable_adapter`.
        """
        with _as_base(self._sylva_model):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; call the module itself, not this method."""
        return self._sylva_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        model: nn.Module | None = self.__dict__.get("_sylva_model")
        if model is None or name.startswith("__"):
            return super().__getattr__(name)
        value = getattr(model, name)
        if not inspect.ismethod(value) or value.__self__ is not model:
            return value

        @functools.wraps(value)
        def with_base(*args: Any, **kwargs: Any) -> Any:
            with _as_base(model):
                return value(*args, **kwargs)

        return with_base

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the base; tensors in which it differs from the model are copies.

        Inside of another module's state dict it is empty: a checkpoint holds the model already.
        """
        if kwargs.get("destination") is not None:
            return kwargs["destination"]
        model = self._sylva_model
        with _as_base(model):
            every = named_tensors(model)
            states = block_states(model).values()
            differing: list[Tensor] = [state.blocks if state.is_quantised else state.weight for state in states]
            differing += [every[name] for name in replaced_tensors(model)]
            addresses = {tensor.data_ptr() for tensor in differing}
            found: dict[str, Any] = model.state_dict(*args, **kwargs)
            for name, value in found.items():
                if isinstance(value, Tensor) and value.data_ptr() in addresses:
                    found[name] = value.detach().clone()
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the base cannot be changed through its reference model; `_sylva_model` is the model to load into."""
        raise NotImplementedError("A reference model shares the weights of its model; load the state dict into that.")


# The model that it runs is compiled as it is; this frame writes weights.
skip_code(ReferenceModel.__call__.__code__)


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """Let `model` be its base, without gradients and in evaluation mode; calls may be nested."""
    training = [module for module in model.modules() if module.training]
    with nullcontext() if is_disabled(model) else disable_adapter(model), torch.no_grad():
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
