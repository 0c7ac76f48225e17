"""Trainings by an ordinary Trainer with `BlocksCallback`, stopped half-way and resumed."""

import shutil
from pathlib import Path

import pytest
import torch
from interrupted import STEPS, STOP, BlocksTrainer, Made, Setting, assert_same, base, make, values
from transformers import Trainer

import sylva_compile
from sylva_compile.errors import ArgumentError
from sylva_compile.integrations import BlocksCallback
from sylva_compile.schedules import MovingBlocks

BF16 = torch.bfloat16
HEAD = ("lm_head.weight",)


def made(directory: Path, setting: Setting, trainer: type = Trainer) -> Made:
    new = make(directory, setting, trainer, callbacks=[])
    new.trainer.add_callback(BlocksCallback(*([] if new.schedule is None else [new.schedule])))
    return new


@pytest.mark.parametrize("schedule", [None, "moving", "layers"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_resumed_training_is_the_undisturbed_one(schedule: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    setting = Setting(schedule=schedule, dtype=dtype, dropout=0.2, trained=HEAD)
    once = made(tmp_path, setting)
    once.trainer.train()
    again = made(tmp_path, setting)
    torch.rand(7)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert again.losses() == once.losses()
    assert_same(again.model, once.model)


def test_without_it_the_low_bits_are_lost(tmp_path: Path) -> None:
    setting = Setting(dtype=BF16)
    once = make(tmp_path, setting, Trainer)
    once.trainer.train()
    again = make(tmp_path, setting, Trainer)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    ours, theirs = values(again.model), values(once.model)
    assert not all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("schedule", [None, "moving"])
def test_the_best_blocks_come_back_with_their_low_bits(schedule: str | None, tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    # The loss falls, so the greatest is that of the first evaluation.
    setting = Setting(schedule=schedule, dtype=BF16, arguments=arguments | {"metric_for_best_model": "loss"})
    best = made(tmp_path / "one", setting)
    best.trainer.train()
    assert best.trainer.state.best_global_step == STOP
    short = made(tmp_path / "two", Setting(schedule=schedule, dtype=BF16))
    short.trainer.args.max_steps = STOP
    short.trainer.train()
    assert_same(best.model, short.model)
    assert dict(best.masks) == dict(short.masks)
    if schedule == "moving":
        sylva_compile.unload_adapter(best.model)
        kept = best.model.state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in base(setting).model.state_dict().items())


def test_beside_the_mixin_it_saves_nothing(tmp_path: Path) -> None:
    setting = Setting(schedule="moving", dtype=BF16)
    once = made(tmp_path, setting, BlocksTrainer)
    once.trainer.train()
    names = {path.name for path in (tmp_path / f"checkpoint-{STEPS}").iterdir()}
    assert "sylva_schedules.pt" in names
    assert not names & {"sylva_schedule.pt", "sylva_blocks.pt", "model.safetensors"}
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    again = made(tmp_path, setting, BlocksTrainer)
    assert isinstance(again.schedule, MovingBlocks)
    again.trainer.train(resume_from_checkpoint=True)
    assert_same(again.model, once.model)


def test_other_masks_are_refused(tmp_path: Path) -> None:
    made(tmp_path, Setting(dtype=BF16)).trainer.train()
    other = made(tmp_path, Setting(dtype=BF16, masks_seed=1))
    with pytest.raises(ArgumentError, match="lie elsewhere in the checkpoint; embed the same masks") as caught:
        other.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert "\n" not in str(caught.value)
