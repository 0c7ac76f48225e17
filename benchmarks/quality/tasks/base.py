"""The interface of a task: its data, its model, its head, and its metrics."""

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
        """Return the number of tokens of every example."""

    @abstractmethod
    def batch(self, chosen: Sequence[int]) -> Batch:
        """Return the keyword arguments of the model for these examples, labels included."""

    def __len__(self) -> int:
        return len(self.lengths())

    def batches(self, size: int, *, seed: int | None = None) -> list[Batch]:
        """Return batches of `size` examples of similar length.

        Args:
            size: B; the last batch may be smaller.
            seed: the seed of a shuffle, after which pools of eight batches are sorted by length. None: all examples are
                sorted by length.
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
    """The three parts of a task's data; no example is in two of them.

    Attributes:
        train: the examples to train on and to trace.
        validation: the examples that choose the learning rate.
        test: the examples of the reported metric.
    """

    train: E
    validation: J
    test: J


@dataclass(frozen=True)
class Sizes:
    """The amounts of a task's data that a run takes.

    Attributes:
        train: the number of examples to train on.
        validation: the number of examples (in generation: of meanings) to choose the learning rate on.
        extra_test: the number of examples to test on, besides those that the task keeps for testing.
        length: the maximum number of tokens of an example.
    """

    train: int
    validation: int
    extra_test: int
    length: int


class TaskError(ValueError):
    """A task cannot run here: data or a model are missing, the data are too few, or its table is invalid."""


def existing(path: Path) -> Path:
    """Return `path`. Raises TaskError where there is no such file."""
    if not path.exists():
        raise TaskError(f"no {path}; name the folder of the data sets with --data.")
    return path


class Task(ABC):
    """A task to fine-tune models on.

    Attributes:
        metric: the name, in tables, of the metric that chooses the learning rate; a fraction, shown in per cent.
        further: the names of other metrics, shown in the units that `evaluate` returns.
    """

    metric: str
    further: Sequence[str] = ()

    @abstractmethod
    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Any, Any]:
        """Return the data, tokenised for `model`, equal for equal sizes; `folder` holds the data sets in files."""

    @abstractmethod
    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Return the model before fine-tuning, with dropout off; `seed` initialises a new head."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: Any, size: int) -> dict[str, Any]:
        """Return `{"metric": ..., "loss": ...}` on a part of the data, and `"further"`, by name, if the task has any.

        Args:
            model: the fine-tuned model.
            part: the validation or the test part.
            size: the number of examples in a batch.
        """

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Return the facts that a row records about the model besides its name."""
        return {}


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout rate of `config` to 0 and return it."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def heads_of(model: nn.Module) -> list[str]:
    """Return those of `HEAD` that the model has."""
    found = {name.split(".")[-1] for name, _ in model.named_modules()}
    return [name for name in HEAD if name in found]


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that every method trains densely."""
    return [
        parameter
        for name, module in model.named_modules()
        if name.split(".")[-1] in HEAD
        for parameter in module.parameters()
    ]


def on(device: torch.device, batch: Batch) -> Batch:
    """Return `batch` on `device`."""
    return {name: value.to(device) for name, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model."""
    return next(model.parameters()).device
