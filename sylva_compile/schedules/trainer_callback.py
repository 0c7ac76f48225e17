"""`ScheduleCallback`: runs a schedule in the Trainer of transformers, and saves it with the Trainer's checkpoints."""

import io
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sylva_compile.errors import ArgumentError
from sylva_compile.files import write_file

FILE = "sylva_schedule.pt"
"""The file of a schedule's state in a checkpoint's directory."""


class Schedule(Protocol):
    """What `MovingBlocks` and `LayerSchedule` have in common."""

    def step(self) -> None:
        """Follow a step of the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on where `state_dict` was made."""


class ScheduleCallback(TrainerCallback):
    """Steps schedules after each step of the optimizer, and resumes them with the Trainer.

        Trainer(model, args, train_dataset=data, callbacks=[ScheduleCallback(MovingBlocks(masks, every=4))])

    Several schedules step in their order.
    """

    def __init__(self, *schedules: Schedule) -> None:
        """Take the schedules of the model that the Trainer trains."""
        self.schedules = schedules

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedules; the Trainer sets gradients to zero afterwards."""
        for schedule in self.schedules:
            schedule.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the schedules' state into the checkpoint's directory."""
        if state.is_world_process_zero:
            file = io.BytesIO()
            torch.save([schedule.state_dict() for schedule in self.schedules], file)
            write_file(_directory(args, state) / FILE, file.getvalue())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the schedules' state where the Trainer resumes from a checkpoint.

        Raises:
            ArgumentError: the checkpoint has no state of schedules, or that of others.
        """
        if state.global_step == 0:
            return
        given = args.resume_from_checkpoint
        path = (Path(given) if given and Path(given).is_dir() else _directory(args, state)) / FILE
        if not path.exists():
            raise ArgumentError(f"There is no {path}; resume from a checkpoint that was saved with ScheduleCallback.")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if len(saved) != len(self.schedules):
            raise ArgumentError(f"{path} holds {len(saved)} schedules, not {len(self.schedules)}; give the same ones.")
        for schedule, state_dict in zip(self.schedules, saved, strict=True):
            schedule.load_state_dict(state_dict)


def _directory(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
