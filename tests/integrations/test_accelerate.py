"""Plain loops with accelerate, stopped half-way and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from interrupted import Setting, assert_same, base, masks_of
from torch.utils.data import DataLoader

import sylva_compile
from sylva_compile.errors import AdapterError, ArgumentError
from sylva_compile.integrations import BlocksState, register_blocks_for_checkpointing
from sylva_compile.schedules import LayerSchedule, MovingBlocks

STEPS, STOP = 6, 3
BF16 = torch.bfloat16
HEAD = ("lm_head.weight",)


class Loop:
    """A training as a user writes it; `register` says what goes into its checkpoints."""

    def __init__(self, setting: Setting, register: Callable[["Loop"], None]) -> None:
        self.accelerator = Accelerator(cpu=True)
        case = base(setting)
        masks = masks_of(case.model, setting)
        self.schedule: Any = None
        trained = [*masks.parameters(), *map(case.model.get_parameter, setting.trained)]
        optimizer = sylva_compile.AdamW(trained, lr=0.01)
        if setting.schedule == "moving":
            self.schedule = MovingBlocks(masks, every=2)
        elif setting.schedule == "layers":
            self.schedule = LayerSchedule(masks, policy="random", fraction=0.5)
        data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(2 * STEPS)]
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(data, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        prepared = self.accelerator.prepare(case.model, optimizer, loader, warm_up)
        self.model, self.optimizer, self.loader, self.warm_up = prepared
        self.losses: list[float] = []
        register(self)

    def run(self, *, save: Path | None = None, resume: Path | None = None) -> "Loop":
        loader = self.loader
        if resume is not None:
            self.accelerator.load_state(str(resume))
            loader = self.accelerator.skip_first_batches(loader, STOP)
        for batch in loader:
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            self.warm_up.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            if save is not None and len(self.losses) == STOP:
                self.accelerator.save_state(str(save))
        return self


def dense(loop: Loop) -> None:
    """Keep the dense model, and beside it the float32 values of the blocks."""
    moving = isinstance(loop.schedule, MovingBlocks)
    objects = [loop.schedule] if moving else [BlocksState(loop.model), *filter(None, [loop.schedule])]
    loop.accelerator.register_for_checkpointing(*objects)


def adapter(loop: Loop) -> None:
    """Keep an adapter."""
    register_blocks_for_checkpointing(loop.accelerator, *filter(None, [loop.schedule]))


@pytest.mark.parametrize("schedule", [None, "moving", "layers"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("register", [dense, adapter])
def test_a_resumed_loop_is_the_undisturbed_one(
    register: Callable[[Loop], None], dtype: torch.dtype, schedule: str | None, tmp_path: Path
) -> None:
    setting = Setting(dtype=dtype, schedule=schedule, dropout=0.2, trained=HEAD)
    once = Loop(setting, register).run(save=tmp_path)
    again = Loop(setting, register)
    torch.rand(7)
    again.run(resume=tmp_path)
    assert again.losses == once.losses[STOP:]
    assert len(once.losses) == STEPS
    assert_same(again.model, once.model)
    assert (tmp_path / "model.safetensors").exists() == (register is dense)
    assert (tmp_path / "adapter" / "sylva_adapter.json").exists() == (register is adapter)


def test_other_masks_and_no_state_are_refused(tmp_path: Path) -> None:
    for register in (dense, adapter):
        Loop(Setting(), register).run(save=tmp_path / register.__name__)
    other = Loop(Setting(masks_seed=1), adapter)
    with pytest.raises(AdapterError, match=r"other masks: the blocks of .* lie elsewhere"):
        other.run(resume=tmp_path / "adapter")
    other = Loop(Setting(masks_seed=1), dense)
    with pytest.raises(ArgumentError, match="lie elsewhere in the checkpoint; embed the same masks"):
        other.run(resume=tmp_path / "dense")
    state = BlocksState(other.model)
    with pytest.raises(ArgumentError, match="no state of blocks"):
        state.load_state_dict({})
    saved = state.state_dict()
    saved["weights"].popitem()
    with pytest.raises(ArgumentError, match="in the model or in the checkpoint, but not in both"):
        state.load_state_dict(saved)


@pytest.mark.parametrize("both_move", [False, True])
def test_two_models_with_schedules_of_their_own(both_move: bool, tmp_path: Path) -> None:
    def made() -> tuple[Accelerator, list[Any], list[Any], list[Any]]:
        accelerator, models, schedules, optimizers = Accelerator(cpu=True), [], [], []
        for number in (0, 1):
            setting = Setting(masks_seed=number)
            case = base(setting)
            masks = masks_of(case.model, setting)
            masks.embed()
            if number == 0 or both_move:
                schedules.append(MovingBlocks(masks, every=1, seed=number))
            optimizers.append(accelerator.prepare(torch.optim.SGD(masks.parameters(), lr=0.1)))
            models.append((accelerator.prepare(case.model), masks, case.batch))
        register_blocks_for_checkpointing(accelerator, *schedules)
        return accelerator, models, schedules, optimizers

    accelerator, models, schedules, optimizers = made()
    for _ in range(2):
        for number, (model, _, batch) in enumerate(models):
            model(**batch).loss.backward()
            optimizers[number].step()
            if number < len(schedules):
                schedules[number].step()
            optimizers[number].zero_grad()
    accelerator.save_state(str(tmp_path))
    again, others, _, _ = made()
    again.load_state(str(tmp_path))
    for (model, masks, _), (other, other_masks, _) in zip(models, others, strict=True):
        assert dict(masks) == dict(other_masks)
        assert_same(other, model)


def test_a_model_without_blocks_is_saved_as_ever(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    plain = accelerator.prepare(torch.nn.Linear(3, 3))
    register_blocks_for_checkpointing(accelerator)
    accelerator.save_state(str(tmp_path))
    before = plain.weight.detach().clone()
    with torch.no_grad():
        plain.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(plain.weight, before)
