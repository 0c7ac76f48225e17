"""The weights whose values lie on several processes in a way that blocks cannot follow, refused by name."""

from typing import Any

from torch import Tensor, nn

from sylva_compile.blocks.shards import is_sharded, is_split_by_rows
from sylva_compile.errors import EmbedError, ScopeError


def check_not_partitioned(name: str, weight: Tensor | None) -> None:
    """Raise ScopeError if processes hold parts of `weight` other than ranges of its rows."""
    if hasattr(weight, "ds_id"):
        raise ScopeError(
            f"{name} is partitioned by DeepSpeed's ZeRO-3, and no process holds its values; train with "
            "DistributedDataParallel or fully_shard instead."
        )
    if weight is not None and weight.numel() == 0:
        raise ScopeError(
            f"{name} is empty on this process (partitioned by DeepSpeed or FullyShardedDataParallel?); train with "
            "DistributedDataParallel or fully_shard instead."
        )
    if is_sharded(weight) and not is_split_by_rows(weight):
        # Any: a DTensor is known here by its name alone.
        placements: Any = weight.placements  # type: ignore[union-attr]
        raise ScopeError(
            f"{name} is split over processes as {tuple(placements)}, as tensor parallelism (parallelize_module) "
            "does it; blocks work in weights that fully_shard splits by rows, so leave it out of scope."
        )


def check_not_parallelized(name: str, module: nn.Module) -> None:
    """Raise ScopeError if tensor parallelism has taken `module`, which holds the weight `name`.

    It splits some weights by rows, as `fully_shard` does, but never gathers them.
    """
    if getattr(module, "_distribute_module_applied", False):
        raise ScopeError(
            f"{name}: tensor parallelism (parallelize_module) has taken its module, and blocks cannot follow; leave "
            "the weight out of the scope, or the module out of the parallelize_plan."
        )


def not_parallel(name: str) -> EmbedError:
    """Return the error for a weight with blocks that tensor parallelism is about to split."""
    return EmbedError(
        f"{name}: tensor parallelism (parallelize_module) and blocks do not go together in one weight; leave its "
        "module out of the parallelize_plan, or the weight out of the scope."
    )
