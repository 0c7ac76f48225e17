"""Checkpoints of accelerate: `Accelerator.save_state` and `load_state` with models that carry blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sylva_compile.adapters.resuming import load_training, save_training
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError
from sylva_compile.integrations.distribution import check_distribution
from sylva_compile.integrations.schedule_states import StateBesideAdapter, masks_that_move
from sylva_compile.integrations.whole_states import load_whole_state_dict, whole_state_dict
from sylva_compile.schedules.protocol import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

_FORMAT = "sylva-blocks-1"


class BlocksState:
    """The float32 values of a model's blocks, for checkpoints that hold the dense model.

        accelerator.register_for_checkpointing(BlocksState(model))

    Dense weights in bfloat16 or float16 hold the blocks rounded. Blocks that move need no `BlocksState`: register the
    `MovingBlocks`, whose state has their values and places.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take an embedded model, or a wrapper of it."""
        self._model = unwrap(model)

    def state_dict(self) -> dict[str, Any]:
        """Return where the blocks are, int32[2, nnz], and their values `[nnz, b, b]`, by weight name, on the CPU."""
        weights = {}
        for name, state in block_states(self._model).items():
            state.sync()
            weights[name] = {
                "positions": state.mask.positions.to(torch.int32),
                "blocks": state.whole_blocks().to("cpu", copy=True),
                "outside": state.checksum_outside(state.mask.positions),
            }
        return {"format": _FORMAT, "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the values into the blocks; the dense weights follow.

        Raises:
            ArgumentError: it is no state of blocks, or one of other masks or another base; nothing is changed then.
        """
        if state_dict.get("format") != _FORMAT:
            raise ArgumentError("This is no state of blocks; give what BlocksState.state_dict() returned.")
        states, saved = block_states(self._model), state_dict["weights"]
        if strange := sorted(states.keys() ^ saved.keys()):
            raise ArgumentError(
                f"{strange[0]} has blocks in the model or in the checkpoint, but not in both; embed the same masks."
            )
        for name, state in states.items():
            if not torch.equal(state.mask.positions, saved[name]["positions"].to("cpu", torch.int64)):
                raise ArgumentError(
                    f"The blocks of {name} lie elsewhere in the checkpoint; embed the same masks, or register the "
                    "MovingBlocks that moves them."
                )
            known, size = saved[name], state.mask.block_size
            if (found := tuple(known["blocks"].shape)) != (wanted := (state.mask.nnz, size, size)):
                raise ArgumentError(
                    f"The blocks of {name} are {found} in the checkpoint and {wanted} here; embed the same masks."
                )
            if known.get("outside", outside := state.checksum_outside(state.mask.positions)) != outside:
                raise ArgumentError(f"{name} holds other values than the base of the checkpoint; load that base.")
        for name, state in states.items():
            state.put_blocks(saved[name]["blocks"])
            state.push()


def register_blocks_for_checkpointing(accelerator: "Accelerator", *schedules: Schedule) -> None:
    """Let `accelerator.save_state` write adapters in the place of dense models, and `load_state` read them.

    Every prepared model that carries blocks is saved so, into the folder "adapter" (or "adapter_1" and so on) of the
    checkpoint, with every other parameter that is trained and the buffers. A training that is resumed goes on exactly.

    Under FSDP2 accelerate writes the dense model in any case. What is added then are the float32 values of the blocks,
    the schedules, and the optimizers' states as whole tensors, and a resumed training goes on exactly as well.

    Args:
        accelerator: of the training loop.
        schedules: of these models; their states are in the checkpoint too. Do not register them once more.

    Raises:
        ArgumentError: accelerate would split models by DeepSpeed or FSDP1.
    """
    check_distribution(accelerator)
    if accelerator.is_fsdp2:
        accelerator.register_for_checkpointing(_BesideDense(accelerator, schedules))
        return
    for schedule in schedules:
        accelerator.register_for_checkpointing(StateBesideAdapter(schedule))

    def save(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        optimized = [p for each in accelerator._optimizers for group in each.param_groups for p in group["params"]]
        for index, model in reversed(list(enumerate(models))):
            if block_states(model):
                if accelerator.is_main_process:
                    save_training(model, Path(output_dir) / _folder(index), optimized)
                del weights[index]

    def load(models: list[nn.Module], input_dir: str) -> None:
        for index, model in reversed(list(enumerate(models))):
            if block_states(model):
                load_training(model, Path(input_dir) / _folder(index), masks_that_move(schedules, model))
                del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class _BesideDense:
    """Adds to a checkpoint of dense models what a training with blocks needs; all processes save and load it."""

    def __init__(self, accelerator: "Accelerator", schedules: Sequence[Schedule]) -> None:
        self._accelerator, self._schedules = accelerator, schedules

    def _blocks(self) -> list[BlocksState]:
        # MovingBlocks keeps the values of its blocks in its own state.
        if masks_that_move(self._schedules) is not None:
            return []
        return [BlocksState(model) for model in self._accelerator._models if block_states(model)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": [each.state_dict() for each in self._blocks()],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "optimizers": [whole_state_dict(optimizer) for optimizer in self._accelerator._optimizers],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        blocks, optimizers = self._blocks(), self._accelerator._optimizers
        here = [len(each) for each in (blocks, self._schedules, optimizers)]
        there = [len(state_dict.get(name, [])) for name in ("blocks", "schedules", "optimizers")]
        if here != there:
            raise ArgumentError(
                f"The checkpoint has the states of {there[0]} models, {there[1]} schedules and {there[2]} optimizers, "
                f"and here are {here[0]}, {here[1]} and {here[2]}; register the same."
            )
        for each, state in zip(blocks, state_dict["blocks"], strict=True):
            each.load_state_dict(state)
        for schedule, state in zip(self._schedules, state_dict["schedules"], strict=True):
            schedule.load_state_dict(state)
        for optimizer, state in zip(optimizers, state_dict["optimizers"], strict=True):
            load_whole_state_dict(optimizer, state)


def _folder(index: int) -> str:
    return "adapter" if index == 0 else f"adapter_{index}"
