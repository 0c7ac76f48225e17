"""The Trainer of `finetune`: checkpoints with the adapter, a stop at a signal, and lines with the loss."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from sylva_compile.blocks.masks import Masks
from sylva_compile.cli.logs import shows_bars
from sylva_compile.cli.options import DataConfig, FinetuneConfig
from sylva_compile.cli.sequences import Example
from sylva_compile.cli.signals import StopAsked
from sylva_compile.config import SylvaConfig
from sylva_compile.integrations.trainer import BlocksTrainerMixin
from sylva_compile.optim.muon import Muon
from sylva_compile.optim.optimizers import AdamW
from sylva_compile.schedules.moving import MovingBlocks
from sylva_compile.schedules.trainer_callback import ScheduleCallback

log = logging.getLogger(__name__)


class BlocksTrainer(BlocksTrainerMixin, Trainer):
    """A Trainer whose checkpoints hold the adapter."""


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint."""

    def __init__(self, asked: StopAsked) -> None:
        """Take what notes the signals."""
        self._asked = asked
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a resumed run save and log as often as it is asked now, not as the checkpoint says."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the Trainer save and stop where any process was asked to."""
        noted = self._asked.noted
        if distributed.is_available() and distributed.is_initialized():
            everywhere = torch.tensor(int(noted), device=args.device)
            distributed.all_reduce(everywhere, op=distributed.ReduceOp.MAX)
            noted = bool(everywhere)
        if noted and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Logs a line with the loss now and then, where no bar shows it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the loss and the learning rate of the last steps."""
        if logs and "loss" in logs:
            rate = float(logs["learning_rate"])
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2g",
                state.global_step,
                state.max_steps,
                float(logs["loss"]),
                rate,
            )


def training_arguments(out: Path, data: DataConfig, options: FinetuneConfig) -> TrainingArguments:
    """Return the Trainer's arguments; making them chooses the device and joins other processes."""
    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=options.epochs,
        max_steps=-1 if options.steps is None else options.steps,
        per_device_train_batch_size=data.batch_size,
        per_device_eval_batch_size=data.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        # A smaller last batch would make the compiler compile a second graph.
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=options.log_every,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not shows_bars(),
        seed=data.seed,
    )


def make_trainer(
    model: PreTrainedModel,
    masks: Masks,
    arguments: TrainingArguments,
    *,
    options: FinetuneConfig,
    settings: SylvaConfig,
    train: Sequence[Example],
    held_out: Sequence[Example],
    batches: list[dict[str, Tensor]],
    stop: StopCallback,
) -> BlocksTrainer:
    """Return the Trainer of the embedded model.

    Args:
        model: embedded and compiled.
        masks: of the model.
        arguments: of the Trainer.
        options: optimizer and moves.
        settings: of the trace, for moves that trace.
        train: sequences to train on.
        held_out: sequences to measure.
        batches: to trace for moves.
        stop: ends the training at a signal.
    """
    callbacks: list[TrainerCallback] = [stop, LogCallback()]
    optimizer = (
        Muon(masks.parameters(), lr=options.lr, momentum=0.8)
        if options.optimizer == "muon"
        else AdamW(masks.parameters(), lr=options.lr)
    )
    if options.every:
        moving = MovingBlocks(
            masks,
            every=options.every,
            choose=options.choose,
            seed=arguments.seed,
            column_budget=settings.column_budget,
            optimizer=optimizer,
            loader=batches,
            config=settings,
        )
        callbacks.append(ScheduleCallback(moving))
    trainer = BlocksTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=default_data_collator,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
