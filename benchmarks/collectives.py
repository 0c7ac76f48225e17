"""`CollectiveBytes`: the bytes that collectives of torch.distributed carry, counted as they run."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WHOLE = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
"""By operator: the name of the collective, and which argument holds the tensors as large as the whole."""
_NONE = {"barrier", "monitored_barrier_"}


class CollectiveBytes(TorchDispatchMode):
    """Inside of the `with` block, counts the bytes of every collective that this process takes part in.

    Those of an all-reduce are the bytes of its tensor, those of an all-gather the bytes of its result, those of a
    reduce-scatter the bytes of its input: what the formulas of `benchmarks.scaling` take. Backward passes count, and so
    do the messages of DistributedDataParallel and FSDP2.

    Attributes:
        bytes: by "all_reduce", "all_gather", "reduce_scatter" or "broadcast".
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            if name in _WHOLE:
                collective, place = _WHOLE[name]
                self.bytes[collective] += _nbytes(args[place])
            elif name not in _NONE:
                raise AssertionError(f"nobody has said how many bytes {name} carries; add it to benchmarks.collectives")
        return func(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value))
