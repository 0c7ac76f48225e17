"""`LayerSchedule`: train a few layers at a time and draw others at every step (IST and RST; Yao et al., EMNLP 2024).

Policy "random" (RST) draws all layers alike. With "importance" (IST), layers have scores, which change every few steps
by the loss of a batch while the trained change of some layers is scaled down, `base + suppress * (trained - base)`;
`layer_scores.py` has the equations.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup

from sylva_compile.blocks import registry
from sylva_compile.blocks.ddp import group_that_averages
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.embedded.wrapping import digest_of, same_on_all
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.schedules.importance import Batches, check_may_suppress, suppressed_losses
from sylva_compile.schedules.layer_names import Layers, find_layers, name_layers
from sylva_compile.schedules.layer_report import LayerReport, LayerRow, trained_below
from sylva_compile.schedules.layer_scores import LayerScores
from sylva_compile.schedules.layer_switch import Mechanism, switch_of
from sylva_compile.tracing.batches import LossFn

Policy = Literal["importance", "random"]


class LayerSchedule:
    """Trains the blocks of a few layers at a time; call `step()` after each `optimizer.step()`.

    Blocks of the other layers get no gradient, so that no optimizer changes them or their states. The backward pass
    ends at the lowest layer that is trained, if nothing below requires grad; `report()` names what does. Weights
    outside of the layers (a head) are trained at every step.

    Make the schedule after the optimizer, which gets all blocks (`masks.parameters()`), and after
    DistributedDataParallel, which needs `find_unused_parameters=True`: a Trainer's optimizer and
    DistributedDataParallel take only what requires grad when they are made. Compile layer by layer
    (`layer.compile(...)`): a model compiled whole would be compiled again for every draw, unless `mechanism` is "gate".
    With "gate", DistributedDataParallel needs no option, and averages zeros for the layers that are closed.

    Attributes:
        layers: the weight names of each layer, by the layer's name.
    """

    def __init__(
        self,
        masks: Masks,
        policy: Policy = "importance",
        fraction: float = 0.25,
        every: int = 10,
        suppress: float = 0.25,
        *,
        seed: int = 0,
        loss: LossFn | None = None,
        batches: Iterable[Any] | None = None,
        layers: Layers | None = None,
        process_group: ProcessGroup | None = None,
        mechanism: Mechanism = "toggle",
    ) -> None:
        """Draw the first layers.

        Args:
            masks: masks bound to the model; they are embedded now unless they are already.
            policy: "importance" (IST) or "random" (RST).
            fraction: the share of the layers that a step trains, rounded down to a number of layers, at least one.
            every: the number of steps between two updates of the scores.
            suppress: what is left of a layer's trained change while its importance is measured.
            seed: of the draws; the same on all ranks.
            loss: `loss(model, batch) -> scalar`; None: `model(**batch).loss`.
            batches: a loader to measure importance on, one batch an update; begun again when it ends. With persistent
                workers it must not be the loader of the training loop.
            layers: weight names by layer, or lists of weight names. None: the members of one list of modules, as in
                "model.layers.3.mlp.up_proj.weight"; of several lists, the one with the most masked weights.
            process_group: losses are averaged over its ranks. Ranks that measure on different batches need it.
            mechanism: "toggle" sets `requires_grad` of the blocks. "gate", for a model that is compiled whole, sets a
                switch in the compiled graph: nothing is compiled again, and weight gradients of closed layers are
                skipped, while the backward pass still goes down to the lowest.

        Raises:
            ArgumentError: an argument is out of its range, there are fewer than two layers, or "importance" has no
                batches.
            MaskError, EmbedError: the masks are not bound, or do not fit.
        """
        if not isinstance(masks, Masks):
            raise ArgumentError(f"masks is a {type(masks).__name__}; give the Masks that trace_and_mask returns.")
        _check_options(policy, fraction, every, suppress, batches, mechanism)
        self.layers = find_layers(masks) if layers is None else name_layers(layers, masks)
        self._model = masks.embed()
        states = block_states(self._model)
        if policy == "importance":
            check_may_suppress(states.values())
        self._switch = switch_of(mechanism, [[states[name] for name in names] for names in self.layers.values()])
        self._policy, self._every, self._suppress, self._loss = policy, every, suppress, loss
        self._size = max(1, int(fraction * len(self.layers)))
        self._process_group, self._batches = process_group, Batches(() if batches is None else batches)
        self._scores = LayerScores(len(self.layers), torch.Generator(device="cpu").manual_seed(seed))
        self._counts, self._steps, self._closed = [0] * len(self.layers), 0, False
        self._same_on_all, self._changes = False, registry.changes()
        self._draw_layers()

    def __enter__(self) -> "LayerSchedule":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> nn.Module:
        """The model whose layers are drawn."""
        return self._model

    @property
    def drawn(self) -> list[str]:
        """The names of the layers that are trained now."""
        names = list(self.layers)
        return names if self._closed else [names[layer] for layer in self._drawn]

    def step(self) -> None:
        """Update the scores if it is time to, and draw the layers of the next step. After `close`, do nothing.

        Raises:
            ArgumentError: `batches` is empty, or an iterator that has ended; or the optimizer lacks blocks of a layer.
            EmbedError: a dense weight was changed in place, so that its trained change is not known; the model carries
                other blocks than those that this schedule was made for; or processes that train together would draw
                different layers.
            TraceError: a batch has no loss.
        """
        if self._closed:
            return
        self._check_blocks()
        if self._policy == "importance" and (self._steps + 1) % self._every == 0:
            self._update_scores()
        if not self._same_on_all:
            self._check_same_on_all()
        self._steps += 1
        self._draw_layers()

    def close(self) -> None:
        """Make all layers trainable again and end the schedule."""
        self._closed = True
        self.open_all()

    def open_all(self) -> None:
        """Make all layers trainable until `open_drawn`: whoever makes an optimizer of them now must see them."""
        self._switch.open_only(range(len(self.layers)))

    def open_drawn(self) -> None:
        """Make the layers that are drawn the only trainable ones again, unless the schedule is closed."""
        if not self._closed:
            self._switch.open_only(self._drawn)

    def report(self) -> LayerReport:
        """Return the score and the draws of each layer, and what is trained below the layers drawn now."""
        drawn = self.drawn
        rows = [
            LayerRow(name, score, count, name in drawn)
            for name, score, count in zip(self.layers, self._scores.scores.tolist(), self._counts, strict=True)
        ]
        trained = itertools.compress(self._switch.layers, (row.trained for row in rows))
        return LayerReport(tuple(rows), trained_below(self._model, itertools.chain.from_iterable(trained)))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on with the same draws, as plain values and tensors."""
        return {
            "policy": self._policy,
            "settings": self._settings(),
            "scores": self._scores.scores.clone(),
            "counts": list(self._counts),
            "drawn": list(self._drawn),
            "steps": self._steps,
            "batches": self._batches.taken,
            "generator": self._scores.generator.get_state(),
            "closed": self._closed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: the layers that were drawn then are trained now.

        The next update skips as many of `batches` as were taken before.

        Raises:
            ArgumentError: `state` is of another settings or other layers, or of no schedule; nothing is changed then.
        """
        generator = torch.Generator(device="cpu")
        try:
            policy, counts, drawn = state["policy"], list(state["counts"]), list(state["drawn"])
            steps, taken, closed = state["steps"], state["batches"], state["closed"]
            scores = state["scores"].to("cpu", torch.float64, copy=True)
            generator.set_state(state["generator"].cpu())
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ArgumentError(
                f"This is no state of a LayerSchedule ({error}); give what state_dict returned."
            ) from error
        if (policy, len(counts), len(scores)) != (self._policy, *[len(self.layers)] * 2):
            raise ArgumentError(
                f"The state is of policy {policy!r} and {len(counts)} layers, this schedule of {self._policy!r} and "
                f"{len(self.layers)}; make the schedule as it was made then."
            )
        # States of older versions have no settings.
        for option, value in self._settings().items() if "settings" in state else ():
            if state["settings"].get(option) != value:
                raise ArgumentError(
                    f"The state is of a schedule with {option}={state['settings'].get(option)!r}, and this one has "
                    f"{value!r}; make the schedule as it was made then."
                )
        self._same_on_all = False
        self._scores.scores, self._scores.generator = scores, generator
        self._counts, self._drawn = counts, drawn
        self._steps, self._closed = steps, closed
        self._batches.skip(taken)
        self._switch.open_only(range(len(self.layers)) if closed else drawn)

    def _settings(self) -> dict[str, Any]:
        layers = {layer: list(names) for layer, names in self.layers.items()}
        return {"layers": layers, "size": self._size, "every": self._every, "suppress": self._suppress}

    def _check_blocks(self) -> None:
        """Raise an error unless the model carries the blocks, and an optimizer steps those that have gradients."""
        states = [state for layer in self._switch.layers for state in layer]
        if self._changes != registry.changes():
            carried = set(block_states(self._model).values())
            if not carried.issuperset(states):
                raise EmbedError("The model carries other blocks now than when this schedule was made; make a new one.")
            self._changes = registry.changes()
        left_out = next((state for state in states if state.blocks.grad is not None and not state.stepped_by), None)
        if left_out is not None and any(state.stepped_by for state in states):
            raise ArgumentError(
                f"The optimizer does not step the blocks of {left_out.name}, which this schedule had switched off when "
                "the optimizer was made; make the optimizer first, or from masks.parameters()."
            )

    def _check_same_on_all(self) -> None:
        """Raise EmbedError if processes whose gradients are averaged would draw different layers."""
        group = group_that_averages(state for layer in self._switch.layers for state in layer)
        if not same_on_all(group, digest_of({"I": self._scores.scores, "draws": self._scores.generator.get_state()})):
            raise EmbedError(
                "The processes would train different layers, and gradients would be averaged with zeros; give all of "
                "them the same seed, and process_group=... where each measures importance on batches of its own."
            )
        self._same_on_all = True

    def _draw_layers(self) -> None:
        self._drawn = self._scores.draw(self._size)
        for layer in self._drawn:
            self._counts[layer] += 1
        self._switch.open_only(self._drawn)

    def _update_scores(self) -> None:
        actions = self._scores.draw_actions()
        states = [[state for layer in action for state in self._switch.layers[layer]] for action in actions]
        losses = suppressed_losses(self._model, states, self._suppress, self._batches, self._loss, self._process_group)
        self._scores.update(actions, losses)
        self._same_on_all = False


def _check_options(policy: str, fraction: float, every: int, suppress: float, batches: object, mechanism: str) -> None:
    """Raise ArgumentError if an option is out of its range."""
    if policy not in get_args(Policy):
        raise ArgumentError(f"policy={policy!r}; use 'importance' or 'random'.")
    if not 0 < fraction <= 1:
        raise ArgumentError(f"fraction={fraction}; give a share of the layers above 0, and 1 at most.")
    if not isinstance(every, int) or every < 1:
        raise ArgumentError(f"every={every}; give a whole number of steps, 1 or more.")
    if not 0 <= suppress < 1:
        raise ArgumentError(f"suppress={suppress}; give a factor from 0 to 1, without 1, which would measure nothing.")
    if mechanism not in get_args(Mechanism):
        raise ArgumentError(f"mechanism={mechanism!r}; use 'toggle' or 'gate'.")
    if policy == "importance" and batches is None:
        raise ArgumentError("policy='importance' measures losses; give batches=loader, or use policy='random'.")
