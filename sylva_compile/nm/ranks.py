"""Masks that are the same on all processes, of which DistributedDataParallel knows nothing."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sylva_compile.embedded.wrapping import check_precision, same_on_all
from sylva_compile.errors import EmbedError
from sylva_compile.nm.mask import NMMask


def of_first_rank(masks: dict[str, NMMask], group: Any) -> dict[str, NMMask]:
    """Return the masks of the first rank of `group`, on every rank; all of them call it. No group is one process."""
    if group is None:
        return masks
    # As an object: masks are on the host, where not every backend can broadcast a tensor.
    shared = [masks]
    dist.broadcast_object_list(shared, src=dist.get_global_rank(group, 0), group=group)
    return shared[0]


def broadcast_places(places: Tensor, group: Any) -> None:
    """Give `places` those of the first rank, in place."""
    sent = places.contiguous()
    dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
    if sent is not places:
        places.copy_(sent)


def same_places_when_wrapped(ddp: Any, model: nn.Module) -> None:
    """Let the pruned weights of `model`, which `ddp` is about to wrap, have the same masks on all of its processes.

    DistributedDataParallel sends the first rank's values. The second masks, and the places of adapters, are chosen from
    values, so the first rank's are sent too. The masks R are compared, since `NMMasks` keeps them outside of the model.

    Raises:
        EmbedError: it is made with `mixed_precision=`, or the processes have other masks.
    """
    modules = list(_pruned(model))
    if not modules:
        return
    check_precision(ddp, modules[0]._nm_layout.name, "pruned weights", "values")
    group = ddp.process_group
    if dist.get_world_size(group) == 1:
        return
    if not same_on_all(group, _digest(modules)):
        raise EmbedError(
            "The processes have pruned their weights in different places, and would train different models; give "
            "process_group=... to prune_masks, or use the same seed on all processes."
        )
    for module in modules:
        for places in _chosen_from_values(module):
            broadcast_places(places, group)


def _pruned(model: nn.Module) -> Iterator[Any]:
    """Yield one module for each pruned weight."""
    seen = set()
    for module in model.modules():
        layout = module.__dict__.get("_nm_layout")
        if layout is not None and layout not in seen:
            seen.add(layout)
            yield module


def _digest(modules: list[Any]) -> str:
    """Return a digest of the masks R, and of everything that decides which places are sent."""
    digest = hashlib.sha256()
    for module in modules:
        layout, low_rank = module._nm_layout, module._nm_low_rank
        adapter = None if low_rank is None else (low_rank.rank, low_rank.codes is None, low_rank.folded is None)
        digest.update(repr((layout.shape, layout.n, layout.m, layout.double, adapter)).encode())
        digest.update(layout.codes.cpu().numpy().tobytes())
    return digest.hexdigest()


def _chosen_from_values(module: Any) -> list[Tensor]:
    layout, low_rank = module._nm_layout, module._nm_low_rank
    adapter = None if low_rank is None else low_rank.codes
    places = [layout.second, *([] if adapter is None else [adapter])]
    return [one for one in places if one.numel()]
