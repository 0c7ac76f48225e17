"""`ScheduleCallback`: runs a schedule in the Trainer of transformers, and saves it with the Trainer's checkpoints."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sylva_compile.blocks import registry
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.fingerprint import base_fingerprint
from sylva_compile.blocks.moving import unwrapped
from sylva_compile.blocks.scope import unwrap
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.errors import ArgumentError
from sylva_compile.files import write_file
from sylva_compile.schedules.history import history_entry
from sylva_compile.schedules.layers import LayerSchedule
from sylva_compile.schedules.protocol import Schedule

SCHEDULE = "schedule"
"""The key of `history_entry` in an entry of the Trainer's log."""
FILE = "sylva_schedule.pt"
"""The file of a schedule's state in a checkpoint's directory."""


class ScheduleCallback(TrainerCallback):
    """Steps schedules after each step of the optimizer, and resumes them with the Trainer.

        Trainer(model, args, train_dataset=data, callbacks=[ScheduleCallback(MovingBlocks(masks, every=8))])

    Several schedules step in their order.

    Attributes:
        schedules: the schedules.
        saved_by_trainer: whether the Trainer itself saves and loads the schedules, as `BlocksTrainerMixin` does.
    """

    saved_by_trainer = False

    def __init__(self, *schedules: Schedule, resume_from: str | os.PathLike[str] | None = None) -> None:
        """Take the schedules of the model that the Trainer trains.

        Args:
            schedules: of one model.
            resume_from: the checkpoint that the Trainer resumes from, where that is not in its own output directory.

        Raises:
            ArgumentError: one is no schedule.
        """
        if strange := [schedule for schedule in schedules if not callable(getattr(schedule, "step", None))]:
            raise ArgumentError(
                f"A {type(strange[0]).__name__} is no schedule; give them one by one: ScheduleCallback(one, other)."
            )
        self.schedules, self._resume_from = schedules, resume_from

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open all layers until the Trainer has made its optimizer, which steps what requires grad then."""
        for schedule in self.schedules:
            if isinstance(schedule, LayerSchedule):
                schedule.open_all()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedules; the Trainer sets gradients to zero afterwards."""
        for schedule in self.schedules:
            schedule.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the moves, the share of places and the scores of layers to the log's entry, for reports."""
        entry = history_entry(self.schedules)
        latest: dict[str, Any] = state.log_history[-1] if state.log_history else {}
        if entry and "loss" in latest:
            latest[SCHEDULE] = entry

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the schedules' state into the checkpoint's directory."""
        if self.saved_by_trainer:
            return
        # All processes take part: under FSDP2 each holds a part of the blocks.
        states = [schedule.state_dict() for schedule in self.schedules]
        content = {"schedules": states, "weights": _fingerprint(kwargs["model"])}
        if state.is_world_process_zero:
            file = io.BytesIO()
            torch.save(content, file)
            write_file(self.directory(args, state) / FILE, file.getvalue())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the schedules' state where the Trainer resumes from a checkpoint.

        Raises:
            ArgumentError: the checkpoint has no state of schedules, or that of others or of other weights; the
                checkpoints of this Trainer would lose the age of each block; or a schedule is of another model.
        """
        self._check_model(kwargs["model"])
        for schedule in self.schedules:
            if isinstance(schedule, LayerSchedule):
                schedule.open_drawn()
        if (optimizer := kwargs.get("optimizer")) is not None:
            # A move finds it even if its first step is skipped.
            registry.note_optimizer(unwrapped(optimizer))
        if self.saved_by_trainer:
            return
        self._check_ages_are_kept(kwargs["model"])
        if state.global_step == 0:
            return
        directory = self.directory(args, state) if self._resume_from is None else Path(self._resume_from)
        self.load(directory, kwargs["model"])

    def load(self, directory: Path, model: nn.Module) -> None:
        """Load the schedules' state from a checkpoint's `directory`, whose dense weights `model` has.

        Raises:
            ArgumentError: as `on_train_begin`.
        """
        path = directory / FILE
        if not path.exists():
            raise ArgumentError(
                f"There is no {path}; resume from a checkpoint that was saved with ScheduleCallback, and give it as "
                "ScheduleCallback(..., resume_from=...) where it is not in the Trainer's output directory."
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["weights"] != _fingerprint(model):
            raise ArgumentError(
                f"{path} belongs to other weights than those that the Trainer has loaded; give the checkpoint that it "
                "resumes from as ScheduleCallback(..., resume_from=...)."
            )
        states = saved["schedules"]
        if len(states) != len(self.schedules):
            raise ArgumentError(f"{path} holds {len(states)} schedules, not {len(self.schedules)}; give the same ones.")
        for schedule, state_dict in zip(self.schedules, states, strict=True):
            schedule.load_state_dict(state_dict)

    def _check_model(self, model: nn.Module) -> None:
        """Raise ArgumentError if a schedule is of another model, whose blocks it would move in silence."""
        for schedule in self.schedules:
            known = getattr(schedule, "masks", schedule)
            if hasattr(known, "model") and (known.model is None or unwrap(known.model) is not unwrap(model)):
                raise ArgumentError(
                    f"The {type(schedule).__name__} is of another model than the Trainer's; make it from the masks of "
                    "the model that the Trainer is given."
                )

    def _check_ages_are_kept(self, model: nn.Module) -> None:
        """Raise ArgumentError under FSDP2 where states hold ages of blocks: the Trainer's checkpoints lose them."""
        carries = any(getattr(schedule, "carry", None) == "intersection" for schedule in self.schedules)
        if carries and any(is_sharded(state.blocks) for state in block_states(model).values()):
            raise ArgumentError(
                "Under FSDP2 this Trainer's checkpoints lose the age of each block, which carry='intersection' needs; "
                "put BlocksTrainerMixin before the Trainer, or use carry='none'."
            )

    def directory(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return the directory of the checkpoint at this step."""
        assert args.output_dir is not None
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of the dense weights that carry blocks."""
    return base_fingerprint(state.weight for state in block_states(model).values())
