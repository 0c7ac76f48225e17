"""`follows`: how a state follows the tensors that `fully_shard` assigns to its module.

FSDP2 assigns to a module's attributes: once a DTensor in place of each parameter, and then in turns the gathered tensor
for a pass and the DTensor after it. The DTensors are the home of the values: optimizers step them, checkpoints hold
them. The gathered tensors live as long as a pass.
"""

import weakref
from typing import Any

from torch import Tensor, nn

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import check_same_places
from sylva_compile.blocks.shards import is_sharded, is_split_by_rows, processes_of, writer_of
from sylva_compile.errors import EmbedError


def follows(state: BlockState, is_weight: bool, value: object) -> bool:
    """Follow an assignment of `value` to the weight of `state`, or to its blocks, if it is one of `fully_shard`.

    Returns:
        Whether the tensors that passes read, or that optimizers step, are others than before.

    Raises:
        EmbedError: the DTensor is split in another way than by rows, or has no values; or other processes have blocks
            in other places.
    """
    home = state.weight if is_weight else state.blocks
    if not isinstance(value, nn.Parameter) or value.shape != home.shape:
        return False
    if is_sharded(value) and not is_sharded(home):
        _shard(state, is_weight, value)
    elif is_sharded(home) and not is_sharded(value):
        _gather(state, is_weight, value)
    elif value is not home:
        return False
    elif is_weight:
        state.live_weight = value
    else:
        state.live_blocks = value
    return True


def _shard(state: BlockState, is_weight: bool, value: nn.Parameter) -> None:
    """Let `value`, the rows that each process holds, be the home from now on."""
    if not is_split_by_rows(value):
        placements: Any = getattr(value, "placements", "another tensor")
        raise EmbedError(
            f"{state.name} would be split as {placements}; blocks work in weights that fully_shard splits by "
            "rows, so shard it by its default."
        )
    if value.device.type == "meta":
        raise EmbedError(
            f"{state.name} has no values (meta device), and what is loaded into it later lacks its blocks; set "
            "accelerate's cpu_ram_efficient_loading to False, or embed the blocks after loading."
        )
    if is_weight and value.dim() == 3:
        raise EmbedError(
            f"{state.name} holds stacked experts, which fully_shard cannot split; name it among the ignored_params of "
            "fully_shard, or leave the experts out of the scope."
        )
    if not is_weight:
        # FSDP splits all blocks as those of the first process are.
        check_same_places([state], processes_of(value))
    if is_weight:
        state.weight = state.live_weight = value
        state.writer = writer_of(value, state.layout.positions, state.mask.block_size)
    else:
        state.earlier_blocks = weakref.ref(state.blocks)
        state.blocks = state.live_blocks = value
    state.mark_synced()


def _gather(state: BlockState, is_weight: bool, value: Tensor) -> None:
    """Let passes read `value`, the gathered tensor, until the DTensor takes its place again."""
    if value.device != state.layout.positions.device:
        # The shards are kept on the CPU, or the model has moved.
        state.layout.to(value.device)
    if is_weight:
        state.live_weight = value  # type: ignore[assignment]
    else:
        state.live_blocks = value  # type: ignore[assignment]
        state.mark_gathered()
