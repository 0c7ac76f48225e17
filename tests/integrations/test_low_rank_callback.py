"""A Trainer pre-trains a pruned model, with adapters in the last steps, and resumes before and after they came."""

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import seed
from tiny_models import tiny
from torch import nn
from transformers import Trainer, TrainingArguments

import sylva_compile
from sylva_compile.errors import ArgumentError
from sylva_compile.integrations import LowRankCallback
from sylva_compile.schedules import MaskChange, ScheduleCallback

STEPS, FIRST = 6, 3


def made(directory: Path, dtype: torch.dtype, resume_from: Path | None = None, **arguments: Any) -> Any:
    seed(0)
    case = tiny("llama", layers=1)
    case.model.to(dtype)
    masks = sylva_compile.prune_masks(case.model)
    masks.embed()
    data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(12)]
    options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    args = TrainingArguments(
        str(directory), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.01, **(options | arguments)
    )
    callbacks = [
        LowRankCallback(3, share=(STEPS - FIRST) / STEPS, resume_from=resume_from),
        ScheduleCallback(MaskChange(masks, every=2), resume_from=resume_from),
    ]
    return Trainer(case.model, args, train_dataset=data, callbacks=callbacks)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_undisturbed_one(dtype: torch.dtype, tmp_path: Path) -> None:
    once = made(tmp_path, dtype)
    once.train()
    wanted = values(once.model)
    assert "model.layers.0.mlp.up_proj.weight_left" in wanted
    assert wanted["model.layers.0.mlp.up_proj.weight_right"].any()
    assert any(
        p is once.model.model.layers[0].mlp.up_proj.weight_left for p in once.optimizer.param_groups[0]["params"]
    )
    for stop in (FIRST - 1, FIRST, FIRST + 1):
        checkpoint = tmp_path / f"checkpoint-{stop}"
        again = made(tmp_path / str(stop), dtype, checkpoint)
        torch.rand(7)
        again.train(resume_from_checkpoint=str(checkpoint))
        found = values(again.model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), stop


def test_a_share_outside_of_the_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="share=0"):
        LowRankCallback(3, share=0)
    assert LowRankCallback(3).first_step(1000) == 990
    assert LowRankCallback(3).first_step(10) == 9


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_checkpoint_with_adapters_is_named(tmp_path: Path) -> None:
    made(tmp_path, torch.float32).train()
    again = made(tmp_path / "again", torch.float32)
    with pytest.raises((ArgumentError, ValueError), match=r"resume_from=|parameter group"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
