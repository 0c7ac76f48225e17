"""Writing files once, where several processes hold parts of what is written."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed import broadcast_object_list, get_rank

from sylva_compile.errors import AdapterError


def on_first_of(sharded: Tensor | None, write: Callable[[], None]) -> None:
    """Call `write` on the first process alone, and let the others wait for it; without shards, on every process.

    Args:
        sharded: a tensor of which every process holds a part; None if there is none.
        write: writes the files.

    Raises:
        AdapterError: the files cannot be written; on every process.
    """
    if sharded is None:
        write()
        return
    failed: list[str | None] = [None]
    if get_rank() == 0:
        try:
            write()
        except AdapterError as error:
            failed = [str(error)]
    broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise AdapterError(failed[0])
