"""The training loop of every method and task."""

import functools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from benchmarks.peak import peak_above
from benchmarks.quality.ready import Ready
from benchmarks.quality.tasks import Batch, head_of
from benchmarks.quality.tasks.base import device_of


@dataclass(frozen=True)
class Trained:
    """The measurements of a training run.

    Attributes:
        loss: mean over the last tenth of the steps; NaN or infinite where the training diverged.
        losses: of every step.
        step_ms: median time of forward pass, backward pass and optimizer step.
        state_bytes: the bytes of the optimizer's state.
        saved_bytes: the bytes that the first batch's forward pass saved for the backward.
        peak_bytes: the peak bytes of tensors during the second step: the model, the optimizer's state, and the most
            that the step adds.
    """

    loss: float
    losses: list[float]
    step_ms: float
    state_bytes: int
    saved_bytes: int
    peak_bytes: int


def optimizer_of(ready: Ready, learning_rate: float, head_learning_rate: float) -> torch.optim.Optimizer:
    """Make a new optimizer for all parameters that a method trains, those of the head included."""
    ids = {id(parameter) for parameter in ready.trained}
    groups: list[dict[str, Any]] = [{"params": ready.trained, "lr": learning_rate}]
    head = [p for p in head_of(ready.model) if p.requires_grad and id(p) not in ids]
    if head:
        groups.append({"params": head, "lr": head_learning_rate})
    return ready.optimizer(groups)


def loss_of(model: nn.Module, batch: Batch, *, autocast: bool = False) -> Tensor:
    """Return the loss of a batch, with `autocast` from products in bfloat16.

    The context is left after every forward pass, since it keeps copies of the weights that train.
    """
    with torch.autocast(device_of(model).type, torch.bfloat16, enabled=autocast):
        loss: Tensor = model(**batch).loss
    return loss


def train(
    ready: Ready, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, *, autocast: bool = False
) -> Trained:
    """Take one step per batch, with a linear warm-up over a tenth of the steps and a linear decay to zero.

    A loss that is not finite ends the training. With `autocast` products are in bfloat16.

    Raises:
        AssertionError: no trained parameter gets a gradient.
    """
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    ready.model.train()
    ready.begin(batches)
    losses: list[float] = []
    seconds: list[float] = []
    saved = peak = 0
    inner: Any = getattr(optimizer, "optim", optimizer)

    def step(at: int, batch: Batch) -> None:
        nonlocal saved
        started = time.perf_counter()
        if at == 0:
            loss, saved = _counting_saved(ready.model, batch, autocast)
        else:
            loss = loss_of(ready.model, batch, autocast=autocast)
        loss.backward()
        if at == 0:
            _check_gradients(learning)
        optimizer.step()
        ready.after_step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)

    for at, batch in enumerate(batches):
        # The peak is measured in the second step: the first one also compiles and makes the optimizer's state.
        if at == min(1, len(batches) - 1):
            model = [*ready.model.parameters(), *ready.model.buffers()]
            held = sum(storage.nbytes() for storage in _storages([*model, *_state(inner)]).values())
            _, added = peak_above(functools.partial(step, at, batch), model[0].device)
            peak = held + added - _bytes(inner)
        else:
            step(at, batch)
        if not math.isfinite(losses[-1]):
            break
    # Methods that train layers in turns may make states later than the second step.
    peak += _bytes(inner)
    last = losses[-max(1, len(losses) // 10) :]
    return Trained(
        loss=statistics.mean(last),
        losses=[round(loss, 4) for loss in losses],
        step_ms=statistics.median(seconds) * 1e3,
        state_bytes=_bytes(inner),
        saved_bytes=saved,
        peak_bytes=peak,
    )


def _counting_saved(model: nn.Module, batch: Batch, autocast: bool) -> tuple[Tensor, int]:
    """Return the loss, and the bytes of storages saved for the backward besides parameters, buffers and the batch."""
    known = _storages([*model.parameters(), *model.buffers(), *batch.values()])
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages.update((at, storage) for at, storage in _storages([tensor]).items() if at not in known)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch, autocast=autocast)
    return loss, sum(storage.nbytes() for storage in storages.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """Return the distinct storages of `tensors`, by address."""
    found = {}
    for tensor in tensors:
        # SHiRA's weights are sparse tensors, which have two storages.
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        found.update((part.untyped_storage().data_ptr(), part.untyped_storage()) for part in parts)
    return found


def _state(optimizer: Any) -> list[Tensor]:
    """Return every tensor of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    # GaLore keeps the basis of its space in an object.
    values = [getattr(value, "ortho_matrix", value) for value in values]
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(optimizer: Any) -> int:
    return sum(value.numel() * value.element_size() for value in _state(optimizer))


def _check_gradients(parameters: Sequence[nn.Parameter]) -> None:
    # One parameter suffices: some are not used by every batch, and a new LoRA's first matrix has a zero gradient.
    assert any(p.grad is not None and bool(p.grad.any()) for p in parameters), "no trained parameter has a gradient"
