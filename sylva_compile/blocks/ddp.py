"""Notes which DistributedDataParallel averages the gradients of blocks, and checks that it can."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed import broadcast_object_list, get_global_rank, get_rank
from torch.nn.parallel import DistributedDataParallel

from sylva_compile._torch import active_ddp, parameters_of_ddp
from sylva_compile.blocks.block_state import BlockState, new_base_id
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.shards import processes_of
from sylva_compile.embedded.wrapping import check_precision, digest_of, not_averaged, same_on_all
from sylva_compile.errors import EmbedError
from sylva_compile.running_calls import argument_of_ddp


@dataclass(frozen=True)
class _Wrapper:
    """The newest DistributedDataParallel that wraps a weight, and whether it averages the gradients of the blocks.

    It does not where they did not require grad when it was made.
    """

    ddp: "weakref.ref[Any]"
    averages: bool = True


_wrappers: "weakref.WeakKeyDictionary[BlockState, _Wrapper]" = weakref.WeakKeyDictionary()


def note_wrapper(ddp: DistributedDataParallel, states: Iterable[BlockState]) -> None:
    """Note that `ddp`, which is being made, wraps those of `states` whose blocks are in its model.

    Raises:
        EmbedError: it is made with `mixed_precision=` and wraps one, or other processes have blocks in other places.
    """
    wrapped = {id(parameter) for parameter in parameters_of_ddp(ddp)}
    inside = [state for state in states if id(state.blocks) in wrapped]
    for state in inside:
        _check_precision(ddp, state.name)
    if inside:
        check_same_places(inside, ddp.process_group)
        if argument_of_ddp(ddp, "init_sync"):
            _follow_first_process(inside, ddp.process_group)
    for state in inside:
        _wrappers[state] = _Wrapper(weakref.ref(ddp), state.blocks.requires_grad)


def _follow_first_process(states: Iterable[BlockState], group: Any) -> None:
    """Take over the base of the first process, whose weights the wrapper is about to give to all of `group`."""
    dense = {state.name: state for state in states if not state.is_quantised}
    kept = {name: (state.originals, state.base_mark) for name, state in dense.items()}
    if same_on_all(group, "".join(f"{checksum(originals.values)} {mark} " for originals, mark in kept.values())):
        return
    first = [kept]
    broadcast_object_list(first, src=get_global_rank(group, 0), group=group)
    if get_rank(group):
        for name, state in dense.items():
            state.originals, state.base_mark = first[0][name]
            state.base_id = new_base_id()


def check_same_places(states: Iterable[BlockState], group: Any) -> None:
    """Raise EmbedError unless the blocks of `states` are in the same places on all processes of `group`."""
    if not same_on_all(group, digest_of({state.name: state.mask.positions for state in states})):
        raise EmbedError(
            "The processes have blocks in different places, and their gradients would be averaged across them; give "
            "process_group=... to trace_and_mask, or the same seed on all processes."
        )


def check_averaged(states: Iterable[BlockState]) -> None:
    """Check, in a training pass, that the running DistributedDataParallel averages the blocks of `states`.

    Raises:
        EmbedError: it was made before the blocks were embedded, or while they did not require grad, or with
            `mixed_precision=`. Outside of such a pass nothing is checked.
    """
    ddp = active_ddp()
    if ddp is None:
        return
    for state in states:
        known = _wrappers.get(state)
        if known is None or known.ddp() is not ddp:
            _check_precision(ddp, state.name)
            if not any(parameter is state.blocks for parameter in parameters_of_ddp(ddp)):
                raise not_averaged(state.name)
            known = _wrappers[state] = _Wrapper(weakref.ref(ddp))
        if not known.averages:
            raise EmbedError(
                f"{state.name}: its blocks did not require grad when DistributedDataParallel wrapped the model, which "
                "would never average their gradients; wrap the model first, then make the LayerSchedule."
            )


def group_that_averages(states: Iterable[BlockState]) -> Any:
    """Return the processes over which DistributedDataParallel or FSDP2 averages gradients of `states`, or None."""
    for state in states:
        if state.split is not None:
            return processes_of(state.split)
        ddp = known.ddp() if (known := _wrappers.get(state)) is not None else None
        if ddp is not None:
            return ddp.process_group
    return None


def _check_precision(ddp: Any, name: str) -> None:
    check_precision(ddp, name, "blocks and dense weights", "blocks")
