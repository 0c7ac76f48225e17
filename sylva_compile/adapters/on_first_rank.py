"""`on_first_rank`: write files once, where several processes hold parts of what is written."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.distributed import broadcast_object_list, get_global_rank, get_rank

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.shards import processes_of
from sylva_compile.errors import AdapterError

_Result = TypeVar("_Result")


def on_first_rank(states: Iterable[BlockState], write: Callable[[], _Result]) -> _Result:
    """Return the result of `write`, which writes files or uploads them.

    Where processes hold parts of `states`, the first of these calls it, and the others wait for the result.

    Raises:
        AdapterError: `write` has failed on the first process, which raises its own error.
    """
    split = next((state.split for state in states if state.split is not None), None)
    group = None if split is None else processes_of(split)
    if group is None:
        return write()
    done: list[Any] = [None, None]
    failure: Exception | None = None
    if get_rank(group) == 0:
        try:
            done[0] = write()
        except Exception as error:
            failure, done[1] = error, str(error)
    broadcast_object_list(done, src=get_global_rank(group, 0), group=group)
    if failure is not None:
        raise failure
    if done[1] is not None:
        raise AdapterError(done[1])
    result: _Result = done[0]
    return result
