"""Batches of a loader: move their tensors to a device, count their sequences, compute their loss."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.errors import TraceError

LossFn = Callable[[nn.Module, Any], Tensor]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor on `device`; mappings, lists and tuples become new ones of the same type."""
    if isinstance(batch, Mapping):
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    move = getattr(batch, "to", None)
    if move is not None:
        return move(device)
    # The constructor of a named tuple takes single values; its `_make` takes an iterable.
    make = getattr(type(batch), "_make", type(batch) if type(batch) in (list, tuple) else None)
    return batch if make is None else make(to_device(value, device) for value in batch)


def _like(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return `values` in a mapping of `batch`'s type: a `BatchEncoding` has attributes that a `dict` lacks."""
    if type(batch) is dict:
        return values
    try:
        made: Any = copy.copy(batch)
        made.update(values)
    except Exception:
        # This mapping cannot be copied and updated, so a dict takes its place.
        return values
    return made  # type: ignore[no-any-return]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in `batch`, also those inside mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_of, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_of, batch))


def count_sequences(batch: Any) -> int:
    """Return the first tensor's first dimension, or 1 where `batch` has no tensor with dimensions."""
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim() > 0), 1)


def loss_of(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> Tensor:
    """Compute the scalar loss of `batch`: `loss_fn(model, batch)` if given, else `model(**batch).loss`.

    Raises:
        TraceError: the batch has no loss, or its loss is not a scalar.
    """
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)  # type: ignore[arg-type]
    elif isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
    else:
        raise TraceError(f"A batch is a {type(batch).__name__}, not a mapping; give loss_fn=lambda model, batch: ...")
    if not isinstance(loss, Tensor):
        hint = "put labels into the batches, or give loss_fn" if loss_fn is None else "return a scalar tensor"
        raise TraceError(f"A batch has no loss ({type(loss).__name__} came back); {hint}.")
    if loss.numel() != 1:
        raise TraceError(f"The loss has shape {tuple(loss.shape)}; return a scalar, such as its mean.")
    return loss
