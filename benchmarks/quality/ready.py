"""A model that a method has prepared for training, and what methods share in preparing it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sylva_compile
from benchmarks.quality.optimizers import MakeOptimizer
from benchmarks.quality.tasks import Batch, head_of
from benchmarks.quality.traces import Scores, budget_elements
from sylva_compile.blocks.scope import weights_in_scope


@dataclass
class Ready:
    """A model that a method has prepared for training.

    Attributes:
        model: the module that is called with the batches.
        trained: the parameters that train at the run's learning rate; the head's parameters train besides.
        checkpoint: returns the bytes that the saved result takes; call it after training.
        optimizer: makes the optimizer from parameter groups.
        trace_seconds: the seconds that the choice of blocks took.
        trace_bytes: the peak bytes of this choice beside the model.
        masks: the masks of the trained blocks, for methods that train blocks.
        begin: called with the training batches before the first step, once there is an optimizer.
        after_step: called after every step of the optimizer; blocks that move do it there.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    checkpoint: Callable[[], int]
    optimizer: MakeOptimizer = lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    trace_seconds: float = 0.0
    trace_bytes: int = 0
    masks: sylva_compile.Masks | None = None
    begin: Callable[[Sequence[Batch]], None] = lambda batches: None
    after_step: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Budgeted:
    """The budget of a method: the weights in `scope`, and as many elements as `sparsity` leaves of their blocks."""

    scope: str
    sparsity: float
    block_size: int

    def elements(self, model: nn.Module) -> int:
        """Return the number of elements that a method may train in `model`."""
        return budget_elements(weights_in_scope(model, self.scope), self.sparsity, self.block_size)


Traced = Callable[[Mapping[str, Any]], Scores]
"""A function that takes the options of a method and returns its block scores."""


def head_alone(model: nn.Module) -> None:
    """Freeze all of a model but its head."""
    model.requires_grad_(False)
    for parameter in head_of(model):
        parameter.requires_grad_(True)


def besides_head(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model without those of its head."""
    head = {id(parameter) for parameter in head_of(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]


def bytes_of(tensors: list[nn.Parameter]) -> int:
    """Return the bytes of some parameters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's whole state dict."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
