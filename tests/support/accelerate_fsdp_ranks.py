"""One of two processes that train by accelerate under FSDP2: `accelerate_fsdp_ranks.py RANK DIRECTORY PORT`.

Every process also trains a twin alone, on the joint batch, and compares.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from interrupted import Setting, base, masks_of
from like_torchrun import one_of_several, shard_on_the_cpu
from torch import Tensor
from trainer_fsdp_ranks import HEAD, assert_equal, difference, values

import sylva_compile
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.integrations import register_blocks_for_checkpointing
from sylva_compile.schedules import MovingBlocks

STEPS, STOP = 4, 2
MOST = 0.1
"""The norm to which gradients are clipped."""


def prepared(version: int = 2, **options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"cpu_ram_efficient_loading": False, "auto_wrap_policy": "transformer_based_wrap", **options}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **settings)
    return Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)


class Loop:
    """A training as a user writes it: no line is there for FSDP2 but the one that makes the accelerator."""

    def __init__(self, setting: Setting, **options: Any) -> None:
        case = base(setting)
        # Four sequences, in two halves for two passes.
        self.ids: Tensor = case.batch["input_ids"]
        self.masks = masks_of(case.model, setting)
        self.masks.embed()
        trained = [*self.masks.parameters(), *map(case.model.get_parameter, setting.trained)]
        optimizer = sylva_compile.AdamW(trained, lr=0.01, eps=1e-6)
        self.accelerator = prepared(**options)
        self.model, self.optimizer = self.accelerator.prepare(case.model, optimizer)
        self.schedules = []
        if setting.schedule is not None:
            self.schedules = [MovingBlocks(self.masks, every=1, carry="intersection")]
        register_blocks_for_checkpointing(self.accelerator, *self.schedules)

    def run(self, steps: int) -> "Loop":
        for step in range(2 * steps):
            with self.accelerator.accumulate(self.model):
                half = self.ids.chunk(2)[step % 2]
                ids = half.chunk(2)[dist.get_rank()]
                self.accelerator.backward(self.model(input_ids=ids, labels=ids).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), MOST)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    for schedule in self.schedules:
                        schedule.step()
                self.optimizer.zero_grad()
        return self


def alone(setting: Setting) -> dict[str, Tensor]:
    """Return the values that one process trains."""
    case = base(setting)
    masks = masks_of(case.model, setting)
    masks.embed()
    trained = [*masks.parameters(), *map(case.model.get_parameter, setting.trained)]
    optimizer = sylva_compile.AdamW(trained, lr=0.01, eps=1e-6)
    schedule = MovingBlocks(masks, every=1, carry="intersection")
    for _ in range(STEPS):
        for ids in case.batch["input_ids"].chunk(2):
            (case.model(input_ids=ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), MOST)
        optimizer.step()
        if setting.schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return dict(case.model.state_dict())


def trains_like_one(setting: Setting, **options: Any) -> None:
    found, wanted = values(Loop(setting, **options).run(STEPS).model), alone(setting)
    if dist.get_rank() == 0:
        assert difference(found, wanted) < 1e-5
        assert difference(found, dict(base(setting).model.state_dict())) > 1e-3


def goes_on(directory: Path, setting: Setting, **options: Any) -> None:
    once = Loop(setting, **options).run(STOP)
    once.accelerator.save_state(str(directory))
    once.run(STEPS - STOP)
    again = Loop(setting, **options)
    again.accelerator.load_state(str(directory))
    again.run(STEPS - STOP)
    assert_equal(values(again.model), values(once.model))
    assert dict(again.masks) == dict(once.masks)


def refusals(directory: Path) -> None:
    with pytest.raises(EmbedError, match="set accelerate's cpu_ram_efficient_loading to False") as caught:
        Loop(Setting(), cpu_ram_efficient_loading=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="FSDP1 lays weights into flat buffers"):
        register_blocks_for_checkpointing(prepared(version=1, sync_module_states=False))
    other = Loop(Setting(schedule="moving"))
    with pytest.raises(ArgumentError, match=r"states of 1 models, 0 schedules and 1 optimizers, and here are 0, 1 and"):
        other.accelerator.load_state(str(directory))


def main(directory: Path) -> None:
    moving = Setting(schedule="moving", trained=HEAD)
    trains_like_one(moving)
    trains_like_one(Setting(), activation_checkpointing=True)
    goes_on(directory / "moving", Setting(schedule="moving", trained=HEAD, dtype=torch.bfloat16))
    goes_on(directory / "fixed", Setting(dtype=torch.bfloat16), state_dict_type="SHARDED_STATE_DICT")
    refusals(directory / "fixed")


if __name__ == "__main__":
    number, folder, port = sys.argv[1:]
    with one_of_several(number, port):
        shard_on_the_cpu()
        main(Path(folder))
