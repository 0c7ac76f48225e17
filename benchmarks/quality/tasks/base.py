"""What a task is: its data, its model, its head, and how a model is judged on it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

HEAD = ("classifier", "score", "classification_head")
"""Endings of the names of modules that every method trains densely; language models have none of them."""

Batch = dict[str, Tensor]


class Examples(ABC):
    """Tokenised examples that come in batches."""

    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of every example."""

    @abstractmethod
    def batch(self, chosen: Sequence[int]) -> Batch:
        """What the model is called with for these examples, labels among it."""

    def __len__(self) -> int:
        return len(self.lengths())

    def batches(self, size: int, *, seed: int | None = None) -> list[Batch]:
        """Batches of `size` examples of like length.

        Args:
            size: B; the last batch may be smaller.
            seed: shuffles; neighbours in length are then sought among eight batches. None: sorted by length.
        """
        lengths = self.lengths()
        if seed is None:
            order = sorted(range(len(lengths)), key=lambda at: lengths[at])
            chosen = [order[at : at + size] for at in range(0, len(order), size)]
        else:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(lengths), generator=generator).tolist()
            pools = [order[at : at + 8 * size] for at in range(0, len(order), 8 * size)]
            order = [at for pool in pools for at in sorted(pool, key=lambda at: lengths[at])]
            chosen = [order[at : at + size] for at in range(0, len(order), size)]
            chosen = [chosen[at] for at in torch.randperm(len(chosen), generator=generator).tolist()]
        return [self.batch(each) for each in chosen]


E = TypeVar("E", bound=Examples)
J = TypeVar("J")


@dataclass(frozen=True)
class Data(Generic[E, J]):
    """What a task is trained, tuned and tested on; nothing is in two of them.

    Attributes:
        train: examples to train on and to trace.
        validation: what chooses the learning rate.
        test: what is reported.
    """

    train: E
    validation: J
    test: J


@dataclass(frozen=True)
class Sizes:
    """How much of a task's data a run takes.

    Attributes:
        train: examples to train on.
        validation: examples (of generation: meanings) to choose the learning rate on.
        extra_test: further ones to test on, besides those that the task keeps for that.
        length: most tokens of an example.
    """

    train: int
    validation: int
    extra_test: int
    length: int


class TaskError(ValueError):
    """A task cannot be had here: data or a model are missing, or too few."""


def existing(path: Path) -> Path:
    """`path`. Raises TaskError where there is no such file."""
    if not path.exists():
        raise TaskError(f"no {path}; name the folder of the data sets with --data.")
    return path


class Task(ABC):
    """A task that models are fine-tuned on.

    Attributes:
        metric: the name, in tables, of the metric that chooses the learning rate; a fraction, shown in per cent.
        further: the names of other metrics, shown in the units that `evaluate` gives.
    """

    metric: str
    further: Sequence[str] = ()

    @abstractmethod
    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Any, Any]:
        """The data, tokenised for `model`; `folder` holds what comes as files. Always the same for the same sizes."""

    @abstractmethod
    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """The model before any training here, dropout off; a new head is drawn from `seed`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: Any, size: int) -> dict[str, Any]:
        """`{"metric": ..., "loss": ...}` on a part of the data, and `"further"` by name where the task has some.

        Args:
            model: fine-tuned.
            part: the validation or the test.
            size: examples at a time.
        """

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """What a row should say of the model besides its name."""
        return {}


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, with every rate of dropout set to 0."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def heads_of(model: nn.Module) -> list[str]:
    """Those of `HEAD` that the model has."""
    found = {name.split(".")[-1] for name, _ in model.named_modules()}
    return [name for name in HEAD if name in found]


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every method trains densely."""
    return [
        parameter
        for name, module in model.named_modules()
        if name.split(".")[-1] in HEAD
        for parameter in module.parameters()
    ]


def on(device: torch.device, batch: Batch) -> Batch:
    """`batch` on `device`."""
    return {name: value.to(device) for name, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters()).device
