"""DistributedDataParallel and embedded weights: when it wraps a model, and what it must not be made with."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import all_gather_object, get_world_size
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from sylva_compile.errors import EmbedError
from sylva_compile.running_calls import argument_of_ddp


def follow_wrapping(follow: Callable[[DistributedDataParallel, nn.Module], None]) -> Any:
    """Call `follow` with each DistributedDataParallel that takes a model, before it sends anything, and with the model.

    Returns a handle whose `remove()` ends that.
    """

    def on_module(module: nn.Module, name: str, submodule: Any) -> None:
        if name == "module" and isinstance(module, DistributedDataParallel):
            follow(module, submodule)

    return register_module_module_registration_hook(on_module)


def check_precision(ddp: Any, name: str, swapped: str, wide: str) -> None:
    """Raise EmbedError, about the weight `name`, if `ddp` is made with `mixed_precision=`.

    Args:
        ddp: a DistributedDataParallel, which may be under construction.
        name: of a weight.
        swapped: names what it would swap.
        wide: names the trained values.
    """
    if argument_of_ddp(ddp, "mixed_precision") is not None:
        raise EmbedError(
            f"{name}: DistributedDataParallel(mixed_precision=...) swaps the memory of {swapped} in every pass; leave "
            f"it out, and load the model in bfloat16 (its {wide} are float32), or use torch.autocast."
        )


def check_not_wrapped(model: nn.Module, name: str) -> None:
    """Raise EmbedError, about the weight `name`, if DistributedDataParallel has wrapped `model` already."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise not_averaged(name)


def not_averaged(name: str) -> EmbedError:
    """Return the error for a weight that was embedded after DistributedDataParallel has wrapped the model."""
    return EmbedError(
        f"{name}: DistributedDataParallel wrapped the model before its masks were embedded, and would never average "
        "the gradients; call masks.embed(model) first, then wrap the model."
    )


def digest_of(places: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors on any device, by name."""
    digest = hashlib.sha256()
    for name in sorted(places):
        digest.update(name.encode() + places[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def same_on_all(group: Any, digest: str) -> bool:
    """Whether all processes of `group` give the same digest; no group is one process. All of them call it."""
    if group is None or get_world_size(group) == 1:
        return True
    digests: list[str | None] = [None] * get_world_size(group)
    all_gather_object(digests, digest, group=group)
    return len(set(digests)) == 1
