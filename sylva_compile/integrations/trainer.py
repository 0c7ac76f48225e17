"""`BlocksTrainerMixin`: Trainers whose checkpoints hold an adapter in the place of the dense model."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from sylva_compile.adapters.format import copy_adapter
from sylva_compile.adapters.resuming import load_training, save_training
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError
from sylva_compile.files import replacing_files
from sylva_compile.integrations.checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    begin_checkpoint,
    check_checkpoint,
    last_whole_checkpoint,
    load_schedules,
    read_schedules,
    save_schedules,
    states_beside_adapter,
)
from sylva_compile.integrations.checks import check_compiled_once, check_reference
from sylva_compile.integrations.distribution import check_distribution, check_fsdp2_arguments
from sylva_compile.integrations.quantised import trainable_although_quantised, wide_blocks
from sylva_compile.integrations.schedule_states import masks_that_move
from sylva_compile.integrations.whole_states import load_whole_state_dict, whole_state_dict
from sylva_compile.schedules.protocol import Schedule
from sylva_compile.schedules.trainer_callback import ScheduleCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

log = logging.getLogger(__name__)


class BlocksTrainerMixin(_Base):
    """A mixin of transformers' Trainer, and of TRL's, for models that carry blocks.

        class Trainer(BlocksTrainerMixin, transformers.Trainer): ...

    Checkpoints hold the adapter, every other parameter that is trained, the buffers, optimizer, scheduler, random
    states, the Trainer's state, and the schedules of a `ScheduleCallback`; not the dense model. A run that is resumed
    has the losses and the weights of one that was never interrupted, in any dtype, with fixed or with moving blocks.
    `save_model(directory)` writes the adapter. For the dense model, call `merge_and_unload(trainer.model)` first.

    DistributedDataParallel and FSDP2 work; checkpoints are the same files as those of one process, and any number of
    processes that share the directory can go on from them.
    """

    model: nn.Module
    args: TrainingArguments
    state: TrainerState
    callback_handler: CallbackHandler
    optimizer: torch.optim.Optimizer | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise ArgumentError where the Trainer's own methods would hide those of this class."""
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[1 : cls.__mro__.index(BlocksTrainerMixin)]
        if any(issubclass(each, Trainer) and not issubclass(each, BlocksTrainerMixin) for each in before):
            raise ArgumentError(f"{cls.__name__} names a Trainer first; name BlocksTrainerMixin before it.")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the Trainer.

        Raises:
            ArgumentError: the TrainingArguments ask accelerate to compile the model, or to split it by DeepSpeed or
                FSDP1, or TRL to mix its parameters into a reference model without blocks; or, under FSDP2, an optimizer
                is given and not `optimizer_cls_and_kwargs`. The model is as before then.
        """
        check_compiled_once([*args, *kwargs.values()])
        with trainable_although_quantised([*args, *kwargs.values()]), wide_blocks([*args, *kwargs.values()]):
            super().__init__(*args, **kwargs)
        check_reference(self.args, self.model, getattr(self, "ref_model", None))

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; raise ArgumentError where accelerate would split weights past their blocks."""
        super().create_accelerator_and_postprocess()
        check_distribution(self.accelerator)

    def _validate_args(self) -> None:
        if self.is_fsdp_enabled:
            check_fsdp2_arguments(self.args, self.optimizer, self.lr_scheduler)
        super()._validate_args()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True resumes the newest checkpoint that was written to its end.

        Raises:
            ArgumentError: the model carries no blocks, or the checkpoint has the state of other schedules.
            AdapterError: the checkpoint is not whole, holds no adapter, or is of another base, other masks or other
                trained parameters.
        """
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None
            resume_from_checkpoint = str(last_whole_checkpoint(Path(self.args.output_dir)))
        if self.model_init is None and not block_states(self.model):
            raise ArgumentError("The model carries no blocks; call masks.embed(model) before training it.")
        # So that callbacks save nothing of their own, whatever this run saves.
        self._schedules()
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _schedules(self) -> list[Schedule]:
        """Return the schedules of the callbacks, which leave saving and loading to this class from now on."""
        callbacks = [each for each in self.callback_handler.callbacks if isinstance(each, ScheduleCallback)]
        for callback in callbacks:
            callback.saved_by_trainer = True
        return [schedule for callback in callbacks for schedule in callback.schedules]

    def _optimized(self) -> Iterator[Tensor]:
        """Yield the parameters of the optimizer, which may hold some that are frozen at the moment."""
        for group in () if self.optimizer is None else self.optimizer.param_groups:
            yield from group["params"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter, the tokenizer and the arguments; of a model without blocks, what the Trainer writes."""
        if not block_states(self.model):
            super()._save(output_dir, state_dict)
            return
        chosen = output_dir if output_dir is not None else self.args.output_dir
        assert chosen is not None
        directory = Path(chosen)
        if self.args.should_save or any(state.split is not None for state in block_states(self.model).values()):
            # Where FSDP2 has split the model, every process gives its part, and the first one writes.
            save_training(self.model, directory, self._optimized())
        if not self.args.should_save:
            return
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        with replacing_files(directory) as beside:
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            torch.save(self.args, beside / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, which would gather the whole dense model under FSDP2; the adapter takes its place."""
        if _internal_call and output_dir is not None and self.args.should_save:
            begin_checkpoint(Path(output_dir))
        if not self.is_fsdp_enabled or not block_states(self.model):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # All processes take part: under FSDP2 each holds a part of the blocks and of their states.
        schedules = states_beside_adapter(self._schedules())
        scheduler, optimizer = self.lr_scheduler, None
        if self.is_fsdp_enabled and self.optimizer is not None:
            optimizer = whole_state_dict(self.optimizer)
        with replacing_files(Path(output_dir)) as beside:
            if optimizer is None or scheduler is None:
                super()._save_optimizer_and_scheduler(str(beside))
            elif self.args.should_save:
                torch.save(optimizer, beside / OPTIMIZER)
                torch.save(scheduler.state_dict(), beside / SCHEDULER)
            if self.args.should_save:
                save_schedules(schedules, beside)

    def _save_scaler(self, output_dir: str) -> None:
        with replacing_files(Path(output_dir)) as beside:
            super()._save_scaler(str(beside))

    def _save_rng_state(self, output_dir: str) -> None:
        with replacing_files(Path(output_dir)) as beside:
            super()._save_rng_state(str(beside))
        # The first process marks the checkpoint as whole next: only once each process has written its random state.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        schedules = self._schedules()
        check_checkpoint(directory)
        read_schedules(schedules, directory)
        load_training(self.model if model is None else model, directory, masks_that_move(schedules))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        if self.is_fsdp_enabled and optimizer is not None and scheduler is not None and checkpoint is not None:
            directory = Path(checkpoint)
            load_whole_state_dict(optimizer, torch.load(directory / OPTIMIZER, map_location="cpu", weights_only=True))
            scheduler.load_state_dict(torch.load(directory / SCHEDULER, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # Only now: the Trainer's optimizer and DistributedDataParallel take the blocks that require grad when they
            # are made, and a LayerSchedule switches some off.
            load_schedules(self._schedules(), Path(checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        directory = Path(self.state.best_model_checkpoint)
        log.info("Loading the best blocks from %s (score: %s).", directory, self.state.best_metric)
        check_checkpoint(directory, only_model=True)
        load_training(self.model, directory, masks_that_move(self._schedules()) or self._carried())

    def _carried(self) -> Masks:
        """Return the masks of the model as it is; they are not those that the user holds."""
        states = block_states(self.model)
        return Masks({name: state.mask for name, state in states.items()}, model=unwrap(self.model))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer copies files of names that it knows, and the adapter's are not among them.
        if block_states(self.model) and self.args.should_save:
            assert self.args.output_dir is not None
            copy_adapter(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)
