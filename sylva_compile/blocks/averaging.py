"""Averaging the gradients of blocks that were embedded after `fully_shard`, which does not know them.

Each process then holds all blocks. When a gradient is there, its sum over processes is under way at once, beside the
rest of the backward pass, and the end of the pass waits for all of them. `set_requires_gradient_sync(False)` and
`set_gradient_divide_factor` of FSDP2 hold for these gradients as well.
"""

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce

from sylva_compile._torch import at_end_of_backward, divisor_of_gradients, reduces_gradients, running_backward
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import check_same_places
from sylva_compile.blocks.shards import is_sharded, processes_of
from sylva_compile.errors import EmbedError


def average_gradients(model: nn.Module, states: Iterable[BlockState]) -> None:
    """Average the gradients of those blocks in `states` whose dense weight is sharded, from now on.

    Raises:
        EmbedError: a weight is a DTensor that `fully_shard` does not gather, or none in a model that it has taken, or
            other processes have other masks.
    """
    states = list(states)
    _check_none_left_out(model, states)
    planned = [(state, _sharded_by(model, state)) for state in states if is_sharded(state.weight)]
    if planned:
        check_same_places([state for state, _ in planned], processes_of(planned[0][0].weight))
    averager = _Averager()
    for state, module in planned:
        averager.follow(state, module)


def _check_none_left_out(model: nn.Module, states: Iterable[BlockState]) -> None:
    """Raise EmbedError if `fully_shard` has taken `model` and left a weight of `states` out."""
    # No module has been taken before this one of torch is imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return
    for state in states:
        if not is_sharded(state.weight):
            raise EmbedError(
                f"fully_shard has left {state.name} out, so nothing would average the gradients of its blocks; embed "
                "the blocks first, then call fully_shard, with dense weights alone among its ignored_params."
            )


def _sharded_by(model: nn.Module, state: BlockState) -> nn.Module:
    """Return the innermost module that `fully_shard` has taken and that holds the weight of `state`."""
    from torch.distributed.fsdp import FSDPModule

    found = None
    for module in model.modules():
        if isinstance(module, FSDPModule) and any(p is state.weight for p in module.parameters()):
            found = module
    if found is None:
        raise EmbedError(
            f"{state.name} is split over processes, and not by fully_shard (tensor parallelism?); leave it out of the "
            "scope."
        )
    return found


class _UnderWay(list[tuple[Any, Tensor, float]]):
    """The sums of a backward pass that are under way: what to wait for, the gradient, and what to divide it by."""

    def finish(self) -> None:
        with torch.no_grad():
            for work, gradient, divisor in self:
                work.wait()
                gradient.div_(divisor)


class _Averager:
    """The sums that are under way, by backward pass."""

    def __init__(self) -> None:
        # A pass keeps its sums until it ends. Those of one that an error has ended are forgotten.
        self._passes: weakref.WeakValueDictionary[int, _UnderWay] = weakref.WeakValueDictionary()

    def follow(self, state: BlockState, module: nn.Module) -> None:
        """Average the gradient of the blocks of `state` in each backward pass in which `module` reduces its own."""
        mesh: Any = state.weight.device_mesh  # type: ignore[attr-defined]
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]

        def reduce(blocks: Tensor) -> None:
            if not reduces_gradients(module):
                return
            assert blocks.grad is not None
            under_way = self._passes.get(running_backward())
            if under_way is None:
                under_way = self._passes[running_backward()] = _UnderWay()
                at_end_of_backward(under_way.finish)
            *outer, last = groups
            for group in outer:
                all_reduce(blocks.grad, group=group)
            work = all_reduce(blocks.grad, group=last, async_op=True)
            under_way.append((work, blocks.grad, divisor_of_gradients(module) or mesh.size()))

        state.blocks.register_post_accumulate_grad_hook(reduce)
