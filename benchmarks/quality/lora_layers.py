"""IST and RST on LoRA: the low-rank changes of a few layers train at a time, as IST's authors do it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from benchmarks.quality.tasks import Batch
from sylva_compile.schedules.layer_names import find_layers
from sylva_compile.schedules.layer_scores import LayerScores

EVERY, SUPPRESS = 10, 0.25
"""The steps between two updates of the scores, and what is left of a change while it is measured."""


class LoraLayers:
    """Trains the LoRA of a share of the layers, drawn anew at every step.

    Attributes:
        drawn: the numbers of the layers that train now.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any], seed: int, batches: Sequence[Batch]) -> None:
        """Draw the first layers.

        Args:
            model: PEFT's wrapper, whose LoRA all requires grad.
            options: `policy`, "importance" (IST) or "random" (RST), and `fraction`, the share of the layers.
            seed: of the draws.
            batches: importance is measured on them, one at a time, from the first on.
        """
        self._model, self._policy = model, options["policy"]
        lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        layers = find_layers(list(lora))
        self._parameters = [[lora[name] for name in names] for names in layers.values()]
        self._modules = [
            [m for m in model.get_submodule(name).modules() if isinstance(m, LoraLayer)] for name in layers
        ]
        self._size = max(1, int(options["fraction"] * len(layers)))
        self._scores = LayerScores(len(layers), torch.Generator().manual_seed(seed))
        self._batches, self._steps = itertools.cycle(batches), 0
        self._draw()

    def step(self) -> None:
        """Update the scores where it is time, and draw the layers of the next step; call it after the optimizer."""
        self._steps += 1
        if self._policy == "importance" and self._steps % EVERY == 0:
            actions, batch = self._scores.draw_actions(), next(self._batches)
            losses = [self._loss_without(action, batch) for action in actions]
            self._scores.update(actions, torch.tensor(losses, dtype=torch.float64))
        self._draw()

    def _draw(self) -> None:
        self.drawn = self._scores.draw(self._size)
        for at, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(at in self.drawn)

    @torch.no_grad()
    def _loss_without(self, action: Sequence[int], batch: Batch) -> float:
        """Return the loss of a batch while the changes of the layers of `action` are scaled down."""
        modules = itertools.chain.from_iterable(self._modules[at] for at in action)
        # Compiled layers would be compiled again for every scale.
        with _scaled(list(modules)), torch.compiler.set_stance("force_eager"):
            self._model.eval()
            loss: float = self._model(**batch).loss.item()
            self._model.train()
        return loss


@contextmanager
def _scaled(modules: Sequence[LoraLayer]) -> Iterator[None]:
    """Scale the changes of `modules` down inside the block."""
    known = [dict(module.scaling) for module in modules]
    try:
        for module in modules:
            for name in module.scaling:
                module.scaling[name] *= SUPPRESS
        yield
    finally:
        for module, scaling in zip(modules, known, strict=True):
            module.scaling.update(scaling)


def check(options: Mapping[str, Any]) -> str | None:
    """Return the error message for a method of PEFT whose layers are drawn, or None if the options are valid."""
    if "policy" in options and options["kind"] in ("dora", "shira"):
        return f"policy is for 'lora' and 'rslora', whose change is scaled; kind={options['kind']!r} takes none"
    return None
