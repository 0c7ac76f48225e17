"""Models that `fully_shard` has split over processes: which processes, and their state between two passes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from sylva_compile._torch import abandon_pass, prepare_pass
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.errors import ArgumentError


def split_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` has taken, the outer ones first."""
    # There are some only once its package is imported, which takes a second.
    package = sys.modules.get("torch.distributed.fsdp")
    return [] if package is None else [module for module in model.modules() if isinstance(module, package.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let `fully_shard` hold shards alone: after a pass without gradients, it may hold whole weights."""
    for module in split_modules(model):
        module.reshard()


def processes_of(
    weights: Mapping[str, nn.Parameter], group: ProcessGroup | None, *, needed: bool
) -> ProcessGroup | None:
    """Return the processes over which `weights` are split; None if none is split.

    Args:
        weights: the weights by name.
        group: the processes that the caller names.
        needed: whether it is an error if the processes are not clear.

    Raises:
        ArgumentError: `group` has other processes, or is left out where a mesh has several dimensions.
    """
    meshes: dict[Any, str] = {}
    for name, weight in weights.items():
        if is_sharded(weight):
            meshes.setdefault(weight.device_mesh, name)  # type: ignore[attr-defined]
    if group is None:
        if len(meshes) == 1 and (mesh := next(iter(meshes))).ndim == 1:
            return mesh.get_group()  # type: ignore[no-any-return]
        if meshes and needed:
            raise ArgumentError(
                "fully_shard has split this model over a mesh of several dimensions; give process_group=, all its "
                "processes."
            )
        return None
    for mesh, name in meshes.items():
        if sorted(mesh.mesh.flatten().tolist()) != sorted(get_process_group_ranks(group)):
            raise ArgumentError(f"{name} is split over other processes than those of process_group; give these.")
    return group if meshes else None


@contextmanager
def between_passes(model: nn.Module) -> Iterator[None]:
    """Let the passes inside the block leave nothing behind in `fully_shard`, also if an error ends one."""
    modules = split_modules(model)
    for module in modules:
        prepare_pass(module)
        module.reshard()
    try:
        yield
    except BaseException:
        for module in modules:
            abandon_pass(module)
        raise
    finally:
        for module in modules:
            module.reshard()
