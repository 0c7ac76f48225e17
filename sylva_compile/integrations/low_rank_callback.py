"""`LowRankCallback`: adds low-rank adapters to a pruned model for the last steps of a Trainer's run."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sylva_compile.errors import ArgumentError
from sylva_compile.nm.adapters import add_low_rank, check_low_rank, pruned_modules
from sylva_compile.nm.low_rank import LEFT, RIGHT, Prune
from sylva_compile.nm.module import VALUES

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"


class LowRankCallback(TrainerCallback, ExportableState):
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
            ArgumentError: the share is not in (0, 1], or as `add_low_rank`.
        """
        check_low_rank(rank, prune)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ArgumentError(f"share={share!r}; use a number above 0, up to 1.")
        self.rank, self.share, self.prune, self.seed = rank, share, prune, seed
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._has_added = False

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into `trainer_state.json`: what a resumed training must agree with."""
        args = {"rank": self.rank, "share": self.share, "prune": self.prune, "seed": self.seed}
        return {"args": args, "attributes": {"_has_added": self._has_added}}

    def first_step(self, max_steps: int) -> int:
        """Return the number of steps before adapters are added."""
        return max_steps - max(1, round(self.share * max_steps))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add adapters now if the checkpoint to resume from has them: its tensors are loaded soon."""
        if self._resume_from is None:
            return
        try:
            saved = json.loads((self._resume_from / _STATE).read_text())
        except OSError as error:
            raise ArgumentError(f"resume_from: {error}; name a checkpoint of the Trainer.") from error
        if self._had_added(saved):
            self._add(kwargs["model"], args)

    def _had_added(self, saved: Mapping[str, Any]) -> bool:
        """Whether a training had adapters when it was saved; ArgumentError if they were others than these."""
        noted = saved.get("stateful_callbacks", {}).get(type(self).__name__)
        if not isinstance(noted, dict):
            # Versions before this note added adapters by the number of steps alone.
            return bool(saved["global_step"] > self.first_step(saved["max_steps"]))
        rank, prune = noted["args"]["rank"], noted["args"]["prune"]
        if noted["attributes"]["_has_added"] and (rank, prune) != (self.rank, self.prune):
            raise ArgumentError(f"The checkpoint has adapters of rank={rank}, prune={prune!r}; give the same.")
        return bool(noted["attributes"]["_has_added"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out now what would be an error when adapters come, and a checkpoint with adapters that was not named.

        Raises:
            ArgumentError: the Trainer resumes from a checkpoint with adapters that the model lacks, or its optimizer
                does not hold the pruned weights.
            EmbedError: the model has no pruned weights.
        """
        modules = pruned_modules(kwargs["model"])
        if _has_adapters(kwargs["model"]):
            return
        if state.global_step and self._had_added(vars(state)):
            raise ArgumentError("The checkpoint has adapters; give it as LowRankCallback(..., resume_from=...).")
        for name, module in modules.items():
            _find(kwargs["optimizer"], name, module)

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
        self._has_added = True


def _has_adapters(model: nn.Module) -> bool:
    return any(module._nm_low_rank is not None for module in pruned_modules(model).values())


def _find(optimizer: Any, name: str, module: Any) -> tuple[dict[str, Any], int]:
    """Return the param group that has the values of a module, and at which place."""
    values = module._parameters[VALUES]
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            if parameter is values:
                return group, at
    raise ArgumentError(
        f"The optimizer does not hold the values of {name}, beside which its adapter would be: they are frozen, or it "
        "was made before masks.embed(model)."
    )


def _join(optimizer: Any, name: str, module: Any) -> None:
    """Put the adapter of a module beside its values in the optimizer, where a resumed Trainer would have it."""
    group, at = _find(optimizer, name, module)
    # A scheduler knows the groups that were there when it was made, so there is no new one.
    group["params"][at + 1 : at + 1] = [module._parameters[LEFT], module._parameters[RIGHT]]
    if "param_names" in group:
        stem = group["param_names"][at].removesuffix(VALUES)
        group["param_names"][at + 1 : at + 1] = [stem + LEFT, stem + RIGHT]
