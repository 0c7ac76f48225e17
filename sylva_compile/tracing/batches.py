"""What a loader's batches are to the tracer: tensors to move and to count, and a loss."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.errors import TraceError

LossFn = Callable[[nn.Module, Any], Tensor]


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; mappings, lists and tuples are new ones of the same kind."""
    if isinstance(batch, Mapping):
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    move = getattr(batch, "to", None)
    if move is not None:
        return move(device)
    # A named tuple wants its values one by one.
    make = getattr(type(batch), "_make", type(batch) if type(batch) in (list, tuple) else None)
    return batch if make is None else make(to_device(value, device) for value in batch)


def _like(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """`values` in a mapping such as `batch`: a tokeniser's `BatchEncoding` has attributes that a `dict` has not."""
    if type(batch) is dict:
        return values
    try:
        made: Any = copy.copy(batch)
        made.update(values)
    except Exception:
        # No mapping that can be copied and changed.
        return values
    return made  # type: ignore[no-any-return]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors in `batch`, through mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_of, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_of, batch))


def count_sequences(batch: Any) -> int:
    """The first tensor's first dimension."""
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim() > 0), 1)


def loss_of(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The scalar loss of `batch`.

    Raises:
        TraceError: there is none, or it is no scalar.
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
