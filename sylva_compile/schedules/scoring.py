"""Scores of all blocks of a weight, which `MovingBlocks` reads before a move: gradient norms, or gains of a trace."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import all_reduce

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import group_that_averages
from sylva_compile.blocks.masks import Masks
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import ArgumentError
from sylva_compile.tracing.batches import LossFn
from sylva_compile.tracing.ranks import same_on_all_ranks
from sylva_compile.tracing.scoring import score_by_tracing
from sylva_compile.tracing.sharded import check_no_experts, sharing_processes
from sylva_compile.tracing.trace import weight_specs

log = logging.getLogger(__name__)


class Source(Protocol):
    """A source of scores.

    Attributes:
        choose: chooses the blocks of a weight itself, from its name, a number of blocks and the places that are
            allowed; None: places are drawn by their scores.
    """

    choose: Callable[[str, int, Tensor], Tensor] | None

    def listen(self) -> None:
        """Prepare for a move after the next step."""

    def take(self) -> dict[str, Tensor]:
        """Return scores of all blocks by weight, none negative; not of weights that have none."""


class FromGradients:
    """The norms of blocks in the weight gradient, from the backward passes since `listen`."""

    choose: Callable[[str, int, Tensor], Tensor] | None = None

    def __init__(self, states: Mapping[str, BlockState], sketch: bool) -> None:
        """Take the weights by name; `sketch`: compiled code estimates the norms without the dense gradient."""
        self._states, self._sketch = states, sketch

    def listen(self) -> None:
        """Score all blocks in the backward passes from now on."""
        for state in self._states.values():
            state.layout.listen(self._sketch)

    def take(self) -> dict[str, Tensor]:
        """Return the norms, averaged over processes, and score no more."""
        heard = {name: state.layout.heard() for name, state in self._states.items()}
        group = group_that_averages(self._states.values())
        scores = {}
        for name, score in heard.items():
            if group is not None:
                # Every process takes part for every weight; one that has not used it adds nothing.
                device = self._states[name].blocks.device
                mine = torch.zeros(self._states[name].mask.block_map().shape, device="cpu") if score is None else score
                score = mine.to(device)
                all_reduce(score, group=group)
                score = score.cpu()
            if score is None or not bool(score.any()):
                continue
            if bool(score.isfinite().all()):
                scores[name] = score.sqrt()
            else:
                log.warning("%s: its gradient was not finite; its blocks stay where they are this time.", name)
        return scores


class FromTrace:
    """The gains of blocks, from a new trace for every move."""

    def __init__(
        self,
        masks: Masks,
        states: Mapping[str, BlockState],
        loader: Iterable[Any],
        config: SylvaConfig,
        loss_fn: LossFn | None,
    ) -> None:
        """Take the masks of the model, its weights by name, and the arguments of `trace_and_mask`.

        Raises:
            ArgumentError: a weight is quantised, the loader gives its batches once only, or the settings give every
                expert the same number of blocks.
        """
        if isinstance(loader, Iterator):
            raise ArgumentError(
                "The loader is an iterator, which the first move would use up; give a list or a DataLoader."
            )
        quantised = next((name for name, state in states.items() if state.is_quantised), None)
        if quantised is not None:
            raise ArgumentError(
                f"{quantised} is quantised, and a model that carries blocks in it cannot be traced; choose places by "
                "'random' or 'gradient'."
            )
        if config.expert_budget == "expert":
            raise ArgumentError(
                "expert_budget='expert', but blocks move between all experts of a weight; leave it out of the config."
            )
        self.choose: Callable[[str, int, Tensor], Tensor] | None = None
        self._masks, self._states = masks, states
        # A checkpoint of one move's trace would stop the trace of the next move, which is of other values.
        self._config = replace(config, checkpoint=None)
        self._loader, self._loss_fn = loader, loss_fn

    def listen(self) -> None:
        """Do nothing: a trace runs batches of its own."""

    def take(self) -> dict[str, Tensor]:
        """Trace the model as it is now; return the gains."""
        model = self._masks.embed()
        weights = {name: state.weight for name, state in self._states.items()}
        specs, group = weight_specs(model, weights), group_that_averages(self._states.values())
        split_over = sharing_processes(weights, group)
        if split_over is not None:
            check_no_experts(specs)
        groups = {"group": group, "split_over": split_over}
        scored = score_by_tracing(model, weights, specs, self._loader, self._config, loss_fn=self._loss_fn, **groups)
        self.choose = scored.choose
        return same_on_all_ranks({name: score.cpu().clamp(min=0) for name, score in scored.scores.items()}, group)
