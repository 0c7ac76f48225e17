"""Methods that train whole layers, few at a time: BAdam and LISA."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.quality.optimizers import Groups
from benchmarks.quality.tasks import head_of
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.schedules.layer_names import find_layers

OPTIONS = frozenset({"every", "layers"})
"""The options of both methods: the steps between changes, and for LISA the number of layers that train at a time."""


class LayersInTurn:
    """Trains the layers of a model in turns; a layer is a member of the list of modules that holds the weights.

    Attributes:
        always: the parameters that train at every step.
        trained: all parameters that train at some time.
    """

    def __init__(
        self, model: nn.Module, scope: str, turns: Callable[[int], Iterator[list[int]]], every: int, forgets: bool
    ) -> None:
        """Freeze all but the head and the layers of the first turn.

        Args:
            model: the model.
            scope: the weights by which layers are found, in the form that `trace_and_mask` takes.
            turns: takes the number of layers; yields the layers to train, turn by turn.
            every: the optimizer's steps in a turn.
            forgets: whether a layer loses its optimizer state at the end of its turn. Otherwise all states stay, and
                embeddings train at every step.
        """
        self._layers = [
            list(model.get_submodule(name).parameters()) for name in find_layers(list(weights_in_scope(model, scope)))
        ]
        self._turns, self._every, self._forgets, self._steps = turns(len(self._layers)), every, forgets, 0
        self._optimizer: torch.optim.Optimizer | None = None
        inside = [parameter for layer in self._layers for parameter in layer]
        embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        self.always = [] if forgets else embeddings
        self.trained = [*inside, *self.always]
        model.requires_grad_(False)
        for parameter in (*head_of(model), *self.always):
            parameter.requires_grad_(True)
        self._open: list[int] = []
        self._change()

    def optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """Return AdamW over parameter groups; parameters of layers that are not trained have no gradient."""
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        return self._optimizer

    def step(self) -> None:
        """Count a step of the optimizer, and begin the next turn where one is due."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._change()

    def _change(self) -> None:
        for at in self._open:
            for parameter in self._layers[at]:
                parameter.requires_grad_(False)
                parameter.grad = None
                if self._forgets and self._optimizer is not None:
                    self._optimizer.state.pop(parameter, None)
        self._open = next(self._turns)
        for at in self._open:
            for parameter in self._layers[at]:
                parameter.requires_grad_(True)


def badam(model: nn.Module, options: Mapping[str, Any], scope: str, seed: int) -> LayersInTurn:
    """Return BAdam (Luo et al., NeurIPS 2024): a layer at a time, in a random order, each once before any twice.

    AdamW starts anew with every turn, so its state is that of one layer. Embeddings stay frozen, as by default there.
    """
    generator = torch.Generator().manual_seed(seed)

    def turns(count: int) -> Iterator[list[int]]:
        while True:
            yield from ([at] for at in torch.randperm(count, generator=generator).tolist())

    return LayersInTurn(model, scope, turns, options["every"], forgets=True)


def lisa(model: nn.Module, options: Mapping[str, Any], scope: str, seed: int) -> LayersInTurn:
    """Return LISA (Pan et al., NeurIPS 2024): the embeddings, and a few layers that are drawn anew in every turn."""
    generator = torch.Generator().manual_seed(seed)

    def turns(count: int) -> Iterator[list[int]]:
        while True:
            yield torch.randperm(count, generator=generator)[: options.get("layers", 2)].tolist()

    return LayersInTurn(model, scope, turns, options["every"], forgets=False)


KINDS = {"badam": badam, "lisa": lisa}


def check(options: Mapping[str, Any]) -> str | None:
    """Return the error message for the options of a method of this file, or None if they are valid."""
    for name in OPTIONS & ({"every"} | options.keys()):
        value = options.get(name)
        if not isinstance(value, int) or value < 1:
            return f"{name}={value!r}; kind={options['kind']!r} takes a number of 1 or more"
    return None
