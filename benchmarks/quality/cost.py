"""The time of a method's training step beside the floor: the forward and backward pass of the frozen model."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.quality.ready import Ready
from benchmarks.quality.tasks import Batch
from benchmarks.quality.tasks.base import device_of
from benchmarks.quality.training import loss_of


class Cost(NamedTuple):
    """Medians over batches, in milliseconds.

    Attributes:
        floor_ms: a forward and backward pass of the frozen model; the backward pass goes down to the embeddings.
        step_ms: a forward and backward pass the optimizer's step of the method, and a move where one is due.
    """

    floor_ms: float
    step_ms: float


def beside_floor(
    floor: nn.Module,
    ready: Ready,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    warm_up: int,
    *,
    autocast: bool = False,
) -> Cost:
    """Time the frozen model and the method in turns, batch by batch.

    Args:
        floor: the model as it was before the method changed it; frozen here.
        ready: the model that the method trains.
        optimizer: the optimizer of `ready`.
        batches: a few batches, of lengths that training saw.
        warm_up: the number of batches to run once before all are timed; a compiler must have seen their lengths.
        autocast: whether both compute in bfloat16.
    """
    floor.requires_grad_(False).train()
    ready.model.train()

    def there_and_back(batch: Batch) -> None:
        inputs = floor.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        loss_of(floor, {"inputs_embeds": inputs, **rest}, autocast=autocast).backward()

    def step(batch: Batch) -> None:
        loss_of(ready.model, batch, autocast=autocast).backward()
        optimizer.step()
        ready.after_step()
        optimizer.zero_grad()

    device = device_of(floor)

    def times(batch: Batch) -> tuple[float, float]:
        return _milliseconds(there_and_back, batch, device), _milliseconds(step, batch, device)

    for batch in batches[:warm_up]:
        times(batch)
    floors, steps = zip(*map(times, batches), strict=True)
    return Cost(statistics.median(floors), statistics.median(steps))


def _milliseconds(work: Callable[[Batch], Any], batch: Batch, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work(batch)
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
