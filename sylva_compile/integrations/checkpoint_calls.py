"""Checks of a call of `torch.distributed.checkpoint`, before it writes or reads anything.

It asks every object for its state dict first, and has its own arguments at hand then. So the errors of these checks are
one line each; torch's own come later, from every process, and are no `Exception`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import get_backend, get_world_size, group, is_initialized

from sylva_compile.errors import AdapterError, ArgumentError
from sylva_compile.running_calls import checkpoint_call

_WHOLE = ".metadata"
"""The file that torch writes last: a checkpoint that has it is whole."""


def calling() -> str:
    """Return the function that asks for a state dict: "save", "async_save" or "load"; "" for any other caller."""
    return checkpoint_call()[0]


def check_saving() -> None:
    """Check the running call of `save` or `async_save`, if any.

    Raises:
        ArgumentError: it would use the messages of the training, or write over a checkpoint.
    """
    name, given = checkpoint_call()
    several = is_initialized() and get_world_size() > 1 and not given.get("no_dist")
    on_default = given.get("process_group") in (None, group.WORLD)
    if name == "async_save" and several and on_default and get_backend() == "gloo":
        raise ArgumentError(
            "async_save would send messages on the default process group while training does; make a group once, "
            "group = torch.distributed.new_group(backend='gloo'), and give process_group=group."
        )
    directory = given.get("checkpoint_id") or getattr(given.get("storage_writer"), "checkpoint_id", None)
    if name and directory is not None and Path(directory, _WHOLE).exists():
        raise ArgumentError(
            f"{directory} holds a checkpoint, and a save over it that is interrupted would leave parts of both; save "
            "each checkpoint into a directory of its own."
        )


def check_loading(owner: Any, own: Mapping[str, Any]) -> None:
    """Check that the running call of `load`, if any, finds everything in `own`, a nested state dict, in its shape.

    Inside of another object that `load` was given, names are not known here, and torch checks them itself.

    Args:
        owner: the object that was asked for its state dict.
        own: that state dict.

    Raises:
        AdapterError: the checkpoint is not whole, or of another model or training.
    """
    name, given = checkpoint_call()
    reader = given.get("storage_reader")
    if name != "load" or reader is None or given.get("elem") is not owner:
        return
    source = getattr(reader, "checkpoint_id", None) or "The checkpoint"
    try:
        known = reader.read_metadata().state_dict_metadata
    except FileNotFoundError as error:
        raise AdapterError(
            f"{source} holds no whole checkpoint ({_WHOLE} is missing): its save did not end; load an earlier one."
        ) from error
    for key, value in _flat(own, given["key"]):
        if key not in known:
            raise AdapterError(
                f"{source} has no {key}; load it with the model, masks, optimizer and schedule that it was saved with."
            )
        there, here = getattr(known[key], "size", None), value.shape if isinstance(value, Tensor) else None
        if there != here:
            raise AdapterError(
                f"{source} has {key} of shape {_shown(there)}, which is {_shown(here)} here; load it with the model, "
                "masks and optimizer that it was saved with."
            )


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries by the names that torch gives to them."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}")


def _shown(shape: Any) -> str:
    return "no tensor" if shape is None else str(tuple(shape))
