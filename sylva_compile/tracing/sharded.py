"""Models that `fully_shard` has split over processes: which processes, and their state between two passes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from sylva_compile._torch import abandon_pass, prepare_pass
from sylva_compile.blocks.shards import is_sharded, processes_of, reshard, split_modules
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import ArgumentError, ScopeError


def sharing_processes(weights: Mapping[str, nn.Parameter], group: ProcessGroup | None) -> ProcessGroup | None:
    """Return the processes over which `weights` are split; None if none is split.

    Args:
        weights: the weights by name.
        group: the processes that the caller names, if any.

    Raises:
        ArgumentError: a weight is split over other processes than those of `group`, or of another weight.
    """
    groups: dict[Any, tuple[str, ProcessGroup]] = {}
    for name, weight in weights.items():
        if is_sharded(weight):
            mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
            if mesh not in groups and (found := processes_of(weight)) is not None:
                groups[mesh] = name, found
    if not groups:
        return None
    chosen = group or next(found for _, found in groups.values())
    for name, found in groups.values():
        if set(get_process_group_ranks(found)) != set(get_process_group_ranks(chosen)):
            whose = "other weights" if group is None else "process_group"
            raise ArgumentError(f"{name} is split over other processes than those of {whose}; trace them apart.")
    return chosen


def check_no_experts(specs: Mapping[str, WeightSpec]) -> None:
    """Raise ScopeError if a weight of `specs`, traced beside weights that `fully_shard` splits, holds experts."""
    stacked = next((name for name, spec in specs.items() if spec.experts > 1), None)
    if stacked is not None:
        raise ScopeError(
            f"{stacked} holds stacked experts beside weights that fully_shard splits, and a trace cannot observe both; "
            "leave the experts out of the scope, or trace before fully_shard."
        )


@contextmanager
def between_passes(model: nn.Module) -> Iterator[None]:
    """Let the passes inside the block leave nothing behind in `fully_shard`, also if an error ends one."""
    modules = split_modules(model)
    for module in modules:
        prepare_pass(module)
    reshard(model)
    try:
        yield
    except BaseException:
        for module in modules:
            abandon_pass(module)
        raise
    finally:
        reshard(model)
