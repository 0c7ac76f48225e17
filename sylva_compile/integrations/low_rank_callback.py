"""`LowRankCallback`: adds low-rank adapters to a pruned model for the last steps of a Trainer's run."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sylva_compile.errors import ArgumentError
from sylva_compile.nm.adapters import add_low_rank, pruned_modules
from sylva_compile.nm.low_rank import LEFT, RIGHT, Prune
from sylva_compile.nm.module import VALUES

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"


class LowRankCallback(TrainerCallback):
    """Adds an adapter to each pruned weight for the last 1% of the steps, and gives it to the Trainer's optimizer.

        Trainer(model, args, train_dataset=data, callbacks=[ScheduleCallback(MaskChange(masks)), LowRankCallback(64)])

    Adapters join the param group of their weight. To resume from a checkpoint that has them, name it.
    """

    def __init__(
        self,
        rank: int,
        *,
        share: float = 0.01,
        prune: Prune = "creation",
        seed: int = 0,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        """Take the arguments of `add_low_rank`.

        Args:
            rank: of every adapter.
            share: the share of all steps that train adapters; at least one step does.
            prune: when L is pruned, see `add_low_rank`.
            seed: of L.
            resume_from: the checkpoint that the Trainer resumes from.

        Raises:
            ArgumentError: the share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ArgumentError(f"share={share!r}; use a number above 0, up to 1.")
        self.rank, self.share, self.prune, self.seed = rank, share, prune, seed
        self._resume_from = None if resume_from is None else Path(resume_from)

    def first_step(self, max_steps: int) -> int:
        """Return the number of steps before adapters are added."""
        return max_steps - max(1, round(self.share * max_steps))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add adapters now if the checkpoint to resume from has them: its tensors are loaded soon."""
        if self._resume_from is None:
            return
        saved = json.loads((self._resume_from / _STATE).read_text())
        if saved["global_step"] > self.first_step(saved["max_steps"]):
            self._add(kwargs["model"], args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ArgumentError where the Trainer resumes from a checkpoint with adapters that the model lacks."""
        if state.global_step > self.first_step(state.max_steps) and not _has_adapters(kwargs["model"]):
            raise ArgumentError("The checkpoint has adapters; give it as LowRankCallback(..., resume_from=...).")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add adapters before the first of the last steps."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if state.global_step < self.first_step(state.max_steps) or _has_adapters(model):
            return
        self._add(model, args)
        for name, module in pruned_modules(model).items():
            _join(optimizer, name, module)
        log.info("Adapters of rank %d are trained from step %d on.", self.rank, state.global_step)

    def _add(self, model: nn.Module, args: TrainingArguments) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        several = args.world_size > 1 and dist.is_initialized()
        group = dist.group.WORLD if several else None
        add_low_rank(model, self.rank, prune=self.prune, generator=generator, process_group=group)


def _has_adapters(model: nn.Module) -> bool:
    return any(module._nm_low_rank is not None for module in pruned_modules(model).values())


def _join(optimizer: Any, name: str, module: Any) -> None:
    """Put the adapter of a module beside its values in the optimizer, where a resumed Trainer would have it."""
    values, held = module._parameters[VALUES], module._parameters
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            if parameter is values:
                # A scheduler knows the groups that were there when it was made, so there is no new one.
                group["params"][at + 1 : at + 1] = [held[LEFT], held[RIGHT]]
                if "param_names" in group:
                    stem = group["param_names"][at].removesuffix(VALUES)
                    group["param_names"][at + 1 : at + 1] = [stem + LEFT, stem + RIGHT]
                return
    raise ArgumentError(f"The optimizer does not hold {name}.{VALUES}; make it after masks.embed(model).")
