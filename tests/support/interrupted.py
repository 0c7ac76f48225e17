"""Trainings of tiny models by a Trainer: made anew at will, so that one can be stopped and another can go on."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantised_models import quantise
from tiny_models import Case, tiny
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import sylva_compile
from sylva_compile import Masks
from sylva_compile.integrations import BlocksTrainerMixin
from sylva_compile.schedules import LayerSchedule, MovingBlocks, ScheduleCallback

STEPS, STOP = 6, 3


class BlocksTrainer(BlocksTrainerMixin, Trainer):
    """What a user writes."""


def seed(number: int) -> None:
    """Seed every generator that a checkpoint keeps."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@dataclass
class Setting:
    """What a training is like.

    Attributes:
        architecture: of `tiny`.
        layers: of the model.
        dtype: of the model.
        schedule: None, "moving" or "layers".
        dropout: of the attention of a Llama.
        trained: names of parameters that are trained whole.
        optimizer: "ours", "torch" or "trainer", which makes its own.
        compiled: whether the model is compiled in place.
        masks_seed: of the blocks' places.
        sparsity: of the blocks.
        samples: in an epoch.
        quantised: the format of the base's linear layers; None: dense.
        arguments: of TrainingArguments.
    """

    architecture: str = "llama"
    layers: int = 2
    dtype: torch.dtype = torch.float32
    schedule: str | None = None
    dropout: float = 0.0
    trained: tuple[str, ...] = ()
    optimizer: str = "ours"
    compiled: bool = False
    masks_seed: int = 0
    sparsity: float = 0.8
    samples: int = 24
    quantised: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Made:
    """A training that can begin."""

    case: Case
    masks: Masks
    trainer: Any
    schedule: Any

    @property
    def model(self) -> Any:
        return self.case.model

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


def base(setting: Setting) -> Case:
    """Make the base model, always the same, and batches."""
    seed(0)
    case = tiny(setting.architecture, layers=setting.layers)
    if setting.architecture == "llama":
        case.model.config.attention_dropout = setting.dropout
        for module in case.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = setting.dropout
    case.model.to(setting.dtype).requires_grad_(False)
    if setting.quantised is not None:
        quantise(case.model, setting.quantised)
        # As `from_pretrained` sets it.
        case.model.is_quantized = True
    for name in setting.trained:
        case.model.get_parameter(name).requires_grad_(True)
    return case


def masks_of(model: nn.Module, setting: Setting) -> Masks:
    seed(setting.masks_seed)
    return sylva_compile.trace_and_mask(model, method="random", sparsity=setting.sparsity, block_size=8)


def make(
    directory: Path,
    setting: Setting,
    trainer_class: type = BlocksTrainer,
    callbacks: list[Any] | None = None,
    **more: Any,
) -> Made:
    """Make a training of `STEPS` steps, always the same."""
    case = base(setting)
    masks = masks_of(case.model, setting)
    masks.embed()
    if setting.compiled:
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
    trained = [*masks.parameters(), *map(case.model.get_parameter, setting.trained)]
    optimizer = {
        "ours": lambda: sylva_compile.AdamW(trained, lr=0.01),
        "torch": lambda: torch.optim.AdamW(trained, lr=0.01),
        "trainer": lambda: None,
    }[setting.optimizer]()
    schedule: Any = None
    if setting.schedule == "moving":
        schedule = MovingBlocks(masks, every=2)
    elif setting.schedule == "layers":
        schedule = LayerSchedule(masks, policy="random", fraction=0.5)
    data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(setting.samples)]
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "save_steps": STOP,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **setting.arguments,
    }
    if callbacks is None:
        callbacks = [] if schedule is None else [ScheduleCallback(schedule)]
    trainer = trainer_class(
        model=case.model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=callbacks,
        optimizers=(optimizer, None),
        **more,
    )
    return Made(case, masks, trainer, schedule)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer, blocks included."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Assert that all parameters and buffers are equal bit for bit, blocks included."""
    ours, theirs = values(found), values(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
