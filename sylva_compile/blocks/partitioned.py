"""The weights whose values lie on several processes in a way that blocks cannot follow, refused by name."""

import sys
from typing import Any

from torch import Tensor, nn

from sylva_compile.errors import EmbedError, ScopeError


def is_dtensor(value: Any) -> bool:
    """Whether `value` is a DTensor."""
    # One exists only once its module is imported, which takes a while and which this library does not need.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_not_partitioned(name: str, weight: Tensor | None) -> None:
    """Raise ScopeError if processes hold parts of `weight` other than ranges of its rows."""
    if hasattr(weight, "ds_id"):
        raise ScopeError(
            f"{name} is partitioned by DeepSpeed's ZeRO-3, and no process holds its values; train with "
            "DistributedDataParallel instead."
        )
    if weight is not None and weight.numel() == 0:
        raise ScopeError(
            f"{name} is empty on this process (partitioned by DeepSpeed or FullyShardedDataParallel?); train with "
            "DistributedDataParallel instead."
        )
    if is_dtensor(weight):
        # Any: DTensor is known here by its name alone.
        placements: Any = weight.placements  # type: ignore[union-attr]
        split = [placement for placement in placements if not placement.is_replicate()]
        if len(split) > 1 or not all(placement.is_shard(0) for placement in split):
            raise ScopeError(
                f"{name} is split over processes as {tuple(placements)}, as tensor parallelism (parallelize_module) "
                "does it, and is nowhere whole; leave it out of scope."
            )


def check_not_parallelized(name: str, module: nn.Module) -> None:
    """Raise EmbedError if tensor parallelism has taken `module`, which holds the weight `name`.

    It splits some weights by rows, as `fully_shard` does, but never gathers them.
    """
    if getattr(module, "_distribute_module_applied", False):
        raise not_parallel(name)


def not_parallel(name: str) -> EmbedError:
    """Return the error for a weight with blocks that tensor parallelism is about to split, or has split."""
    return EmbedError(
        f"{name}: tensor parallelism (parallelize_module) and blocks do not go together in one weight; leave its "
        "module out of the parallelize_plan, or the weight out of the scope."
    )
