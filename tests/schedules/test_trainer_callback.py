import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Case, tiny
from transformers import Trainer, TrainingArguments

import sylva_compile
from sylva_compile.errors import ArgumentError
from sylva_compile.reports import read_history
from sylva_compile.schedules import LayerSchedule, MovingBlocks, ScheduleCallback
from sylva_compile.schedules.history import history_entry


def made(directory: Path, steps: int) -> tuple[Case, MovingBlocks, Trainer]:
    """Make a Trainer of a tiny Llama whose blocks move at every second step."""
    torch.manual_seed(0)
    case = tiny("llama")
    case.model.requires_grad_(False)
    masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)
    schedule = MovingBlocks(masks, every=2)
    data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(24)]
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    callbacks = [ScheduleCallback(schedule)]
    trainer = Trainer(case.model, args, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None))  # type: ignore[arg-type]
    return case, schedule, trainer


def test_a_trainer_moves_blocks_and_resumes(tmp_path: Path) -> None:
    case, schedule, trainer = made(tmp_path / "once", 6)
    base = copy.deepcopy(case.model.state_dict())
    trainer.train()
    assert schedule.moves == 3
    again, its_schedule, its_trainer = made(tmp_path / "once", 6)
    its_trainer.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-3"))
    assert its_schedule.steps == 6
    assert dict(its_schedule.masks) == dict(schedule.masks)
    values: Any = again.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in case.model.state_dict().items())
    assert not all(torch.equal(value, values[name]) for name, value in base.items())
    sylva_compile.unload_adapter(again.model)
    assert all(torch.equal(value, base[name]) for name, value in again.model.state_dict().items())


def test_the_log_tells_moves_and_places_for_reports(tmp_path: Path) -> None:
    _, schedule, trainer = made(tmp_path, 6)
    trainer.args.logging_steps = 2
    trainer.train()
    history = read_history(tmp_path)
    assert history.moves == [(2, 1.0), (4, 2.0), (6, 3.0)]
    shares = [share for _, share in history.places]
    assert 0.2 < shares[0] < shares[-1] == pytest.approx(history_entry([schedule])["places"])
    assert [step for step, _ in history.loss] == [2, 4, 6]


def test_the_log_tells_the_scores_of_layers(tmp_path: Path) -> None:
    case = tiny("llama")
    masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)
    masks.embed(case.model)
    schedule = LayerSchedule(masks, "random", fraction=0.5)
    assert history_entry([schedule]) == {"importance": {"model.layers.0": 0.0, "model.layers.1": 0.0}}
    assert history_entry([]) == {}


def test_a_checkpoint_without_the_schedule_is_refused(tmp_path: Path) -> None:
    _, _, trainer = made(tmp_path, 3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "sylva_schedule.pt").unlink()
    _, _, trainer = made(tmp_path, 6)
    with pytest.raises(ArgumentError, match="was saved with ScheduleCallback"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_elsewhere_is_given_and_never_mixed_up(tmp_path: Path) -> None:
    _, _, trainer = made(tmp_path / "one", 3)
    trainer.train()
    case, _, trainer = made(tmp_path / "other", 3)
    case.batch["labels"].copy_(case.batch["labels"].flip(0))
    trainer.train()
    checkpoint = str(tmp_path / "one" / "checkpoint-3")
    _, _, trainer = made(tmp_path / "other", 6)
    with pytest.raises(ArgumentError, match="belongs to other weights"):
        trainer.train(resume_from_checkpoint=checkpoint)
    _, schedule, trainer = made(tmp_path / "other", 6)
    trainer.remove_callback(ScheduleCallback)
    trainer.add_callback(ScheduleCallback(schedule, resume_from=checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint)
    assert schedule.steps == 6
