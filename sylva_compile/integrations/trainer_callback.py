"""`BlocksCallback`: keeps, in the checkpoints of an ordinary Trainer, what dense weights do not hold of blocks.

A Trainer without `BlocksTrainerMixin` saves and loads the dense model; no callback can change that. The dense weights
of a bfloat16 or float16 model hold its blocks rounded, so this callback writes their float32 values beside them.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError
from sylva_compile.files import write_file
from sylva_compile.integrations.accelerate import BlocksState
from sylva_compile.integrations.checks import check_compiled_once
from sylva_compile.schedules.moving import MovingBlocks
from sylva_compile.schedules.trainer_callback import ScheduleCallback

_MASTERS = "sylva_blocks.pt"


class BlocksCallback(ScheduleCallback):
    """A `ScheduleCallback`, with or without schedules, that also keeps the float32 values of blocks.

        Trainer(model, args, train_dataset=data, callbacks=[BlocksCallback()])

    A run that is resumed has the losses and the weights of one that was never interrupted, and
    `load_best_model_at_end` restores blocks and schedules of the best step. Checkpoints hold the dense model; with
    `BlocksTrainerMixin` they hold the adapter instead, and then this callback has nothing to save.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise ArgumentError where the Trainer would compile the model with another backend."""
        check_compiled_once([args, kwargs["model"]])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the blocks and the schedules' state into the checkpoint's directory."""
        if not self.saved_by_trainer and not self._values_kept():
            # All processes take part, as in ScheduleCallback.
            blocks = BlocksState(kwargs["model"]).state_dict()
            if state.is_world_process_zero:
                file = io.BytesIO()
                torch.save(blocks, file)
                write_file(self.directory(args, state) / _MASTERS, file.getvalue())
        super().on_save(args, state, control, **kwargs)

    def _values_kept(self) -> bool:
        """Whether a schedule has the values of blocks in its own state, as `MovingBlocks` does."""
        return any(isinstance(schedule, MovingBlocks) for schedule in self.schedules)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load blocks and schedules of the best step where the Trainer has loaded its dense weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and not self.saved_by_trainer:
            for block_state in block_states(kwargs["model"]).values():
                block_state.blocks.grad = None
            self.load(Path(state.best_model_checkpoint), kwargs["model"])

    def load(self, directory: Path, model: nn.Module) -> None:
        """Load blocks and schedules from a checkpoint's `directory`, whose dense weights `model` has.

        Raises:
            ArgumentError: the checkpoint has no state of schedules, or that of others, of other weights or masks; or it
                lacks the float32 values of blocks that dense weights hold rounded.
        """
        rounded = any(state.weight.dtype != state.blocks.dtype for state in block_states(model).values())
        if rounded and not self._values_kept() and not (directory / _MASTERS).is_file():
            raise ArgumentError(
                f"{directory} lacks {_MASTERS}, so its blocks are rounded; resume it with the ScheduleCallback that "
                "saved it, or begin anew."
            )
        super().load(directory, model)
        if (path := directory / _MASTERS).is_file():
            BlocksState(model).load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
