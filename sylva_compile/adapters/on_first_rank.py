"""`on_first_rank`: write files once, where several processes hold parts of what is written."""

from collections.abc import Callable

from torch.distributed import broadcast_object_list, get_rank

from sylva_compile.errors import AdapterError


def on_first_rank(write: Callable[[], None]) -> None:
    """Call `write`, which writes files, on the first process alone, and let the others wait for it.

    Raises:
        AdapterError: the files cannot be written; on every process.
    """
    failed: list[str | None] = [None]
    if get_rank() == 0:
        try:
            write()
        except AdapterError as error:
            failed = [str(error)]
    broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise AdapterError(failed[0])
