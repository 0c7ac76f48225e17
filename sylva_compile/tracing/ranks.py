"""The steps of a trace that several processes take together."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_object, broadcast_object_list, get_rank, get_world_size
from torch.distributed import get_global_rank as global_rank

from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.tracing.progress import TraceProgress

_Result = TypeVar("_Result")

_END = object()

NO_BATCHES = "The loader gave no batches; give one with data (an iterator is used up after one pass)."


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in `group` and the number of processes; 0 and 1 without a group."""
    return (0, 1) if group is None else (get_rank(group), get_world_size(group))


def share_of_samples(num_samples: int, group: ProcessGroup | None) -> int:
    """Return the number of sequences, out of `num_samples`, that this process traces.

    Raises:
        ArgumentError: there are fewer sequences than processes.
    """
    rank, size = rank_and_size(group)
    if num_samples < size:
        raise ArgumentError(f"num_samples={num_samples} is less than the {size} processes; give each one at least.")
    return num_samples // size + (rank < num_samples % size)


def on_every_rank(work: Callable[[], _Result], group: ProcessGroup | None) -> _Result:
    """Return the result of `work`. If it fails on one rank of `group`, all raise, so that none waits for the others."""
    if group is None:
        return work()
    result: list[_Result] = []
    together(lambda: result.append(work()), group)
    return result[0]


def together(work: Callable[[], _Result], group: ProcessGroup, errors: type[Exception] = Exception) -> list[_Result]:
    """Return the result of `work` on each rank of `group`. If it fails on one with one of `errors`, all raise."""
    try:
        mine = work()
    except errors as error:
        exchange(None, group, failure=error)
        raise
    return exchange(mine, group)


def exchange(mine: _Result, group: ProcessGroup, *, failure: Exception | None = None) -> list[_Result]:
    """Return what each rank of `group` gives; if one gives a failure, all raise."""
    everyone: list[Any] = [None] * get_world_size(group)
    all_gather_object(everyone, (mine, None if failure is None else _first_line(failure)), group=group)
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(everyone):
        if reason is not None:
            raise TraceError(f"Process {rank} of {len(everyone)} could not trace: {reason}")
    return [given for given, _ in everyone]


def turns(
    loader: Iterable[Any], wanted: Callable[[], bool], group: ProcessGroup, failures: list[Exception]
) -> Iterator[tuple[Any, bool]]:
    """Yield batches, equally many on each rank of `group`, and whether each counts.

    A rank that has no batch any more gets its last one again, which does not count.

    Args:
        loader: this rank's batches.
        wanted: whether this rank shall take another one.
        group: the ranks.
        failures: errors of this rank; if there is one on any rank, all raise.
    """
    batches, last, ended = iter(loader), _END, False
    while True:
        batch = _END
        try:
            if wanted() and not ended:
                batch = next(batches, _END)
                ended = batch is _END
            if batch is _END and last is _END:
                raise TraceError(NO_BATCHES)
        except Exception as error:
            failures.append(error)
        failure = failures[0] if failures else None
        if not any(exchange(batch is not _END, group, failure=failure)):
            return
        counts, last = batch is not _END, last if batch is _END else batch
        yield last, counts


def progress_of_all_ranks(mine: TraceProgress, group: ProcessGroup | None) -> TraceProgress:
    """Return the sum of the progress of all ranks of `group`."""
    if group is None:
        return mine
    everyone = [mine] * get_world_size(group)
    all_gather_object(everyone, mine, group=group)
    return TraceProgress(
        batches=sum(one.batches for one in everyone),
        sequences=sum(one.sequences for one in everyone),
        seen=list(dict.fromkeys(name for one in everyone for name in one.seen)),
        missed={name: why for one in everyone for name, why in one.missed.items()},
    )


def same_on_all_ranks(maps: dict[str, Tensor], group: ProcessGroup | None) -> dict[str, Tensor]:
    """Return the block maps of the first rank of `group`, on every rank."""
    if group is None:
        return maps
    # As an object: maps are on the host, where not every backend can broadcast a tensor.
    shared = [maps]
    broadcast_object_list(shared, src=global_rank(group, 0), group=group)
    return shared[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
