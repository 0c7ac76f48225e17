"""`add_low_rank` and `fold_low_rank`: low-rank adapters for the last steps, and their place in the sparse product."""

import logging
from typing import Any, get_args

import torch
from torch import nn

from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.nm.averaging import average_here, note_carried, note_replaced
from sylva_compile.nm.embedding import nm_modules, sharing
from sylva_compile.nm.low_rank import LEFT, RIGHT, LowRank, Prune
from sylva_compile.nm.module import VALUES, values_of
from sylva_compile.nm.ranks import broadcast_places

log = logging.getLogger(__name__)


def pruned_modules(model: nn.Module) -> dict[str, Any]:
    """Return the pruned modules of `model` by weight name. Raises EmbedError where there are none."""
    found = nm_modules(model)
    if not found:
        raise EmbedError("The model has no pruned weights; call prune_masks(model) and backend(masks) first.")
    return found


def check_low_rank(rank: int, prune: Prune) -> None:
    """Raise ArgumentError unless these can be arguments of `add_low_rank`."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ArgumentError(f"rank={rank!r}; use a positive integer.")
    if prune not in get_args(Prune):
        raise ArgumentError(f"prune={prune!r}; use 'creation' or 'fold'.")


def add_low_rank(
    model: nn.Module,
    rank: int,
    *,
    prune: Prune = "creation",
    generator: torch.Generator | None = None,
    process_group: Any = None,
) -> list[nn.Parameter]:
    """Put a low-rank adapter beside each pruned weight: its output gets `(x L Rt) / rank` added.

    Rt `[rank, out]` is zero at first, so that the output stays. SLoPe adds adapters for the last 1% of the steps. The
    model is compiled once more; nothing else changes. Give the parameters to the optimizer (`add_param_group`).

    Args:
        model: a pruned model, or a wrapper of it.
        rank: of every adapter.
        prune: "creation": L is N:M along the inputs from the beginning, so that `fold_low_rank` changes nothing.
            "fold": L is dense until it is folded, as in SLoPe, which deploys another model than it trains.
        generator: of the CPU, for L, drawn from N(0, 1).
        process_group: where DistributedDataParallel has wrapped the model already, its group: the first rank's L is
            sent to all, and gradients are averaged at the end of each backward pass.

    Returns:
        L and Rt of each weight, in turns, in the order of the model.

    Raises:
        ArgumentError: the rank is no positive integer, or `prune` is unknown.
        EmbedError: the model has no pruned weights, has adapters already, or DistributedDataParallel has wrapped
            `model` and no `process_group` is given.
    """
    check_low_rank(rank, prune)
    modules = pruned_modules(model)
    if with_one := [name for name, module in modules.items() if module._nm_low_rank is not None]:
        raise EmbedError(f"{with_one[0]} has an adapter already; add adapters once.")
    if frozen := [name for name, module in modules.items() if module._nm_layout.frozen]:
        raise EmbedError(f"{frozen[0]} is frozen for inference; add adapters before masks.freeze().")
    if process_group is None and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise EmbedError(
            "DistributedDataParallel has wrapped the model and would not average the gradients of adapters; add them "
            "before, or give its process_group."
        )
    made = [(module, _make(name, module, rank, prune, generator)) for name, module in modules.items()]
    added = []
    for module, (low_rank, *parameters) in made:
        _install(unwrap(model), module, low_rank, *parameters)
        added += parameters
    if process_group is not None:
        _from_first_rank(modules, added, process_group)
    return added


def _make(
    name: str, module: Any, rank: int, prune: Prune, generator: torch.Generator | None
) -> tuple[LowRank, nn.Parameter, nn.Parameter]:
    layout, values = module._nm_layout, module._parameters[VALUES]
    drawn = torch.randn((layout.in_features, rank), generator=generator, device="cpu", dtype=values.dtype)
    low_rank = LowRank(name, rank, layout.n, layout.m, None)
    if prune == "creation":
        drawn, low_rank.codes = low_rank.pruned(drawn)
    left = nn.Parameter(drawn.to(values.device))
    right = nn.Parameter(values.new_zeros((rank, layout.out_features)))
    low_rank.to(values.device)
    return low_rank, left, right


def _install(model: nn.Module, module: Any, low_rank: LowRank, left: nn.Parameter, right: nn.Parameter) -> None:
    for parameter in (left, right):
        note_carried(parameter, low_rank.name)
    for owner in sharing(model, module._nm_layout):
        owner.__dict__["_nm_low_rank"] = low_rank
        owner.register_parameter(LEFT, left)
        owner.register_parameter(RIGHT, right)


def _from_first_rank(modules: dict[str, Any], added: list[nn.Parameter], group: Any) -> None:
    average_here(added, group)
    for module in modules.values():
        if (codes := module._nm_low_rank.codes) is not None:
            broadcast_places(codes, group)


def fold_low_rank(model: nn.Module) -> nn.Module:
    """Fold the L of each adapter into the sparse product, for inference, in place: one product for both.

    The output is that of before, but for rounding; an L that is dense until now is pruned by magnitude first, which
    changes it. The parameters of pruned weights are frozen and take their weights' dtype; train before, not
    afterwards. Second masks are dropped.

    Returns:
        The model.

    Raises:
        EmbedError: the model has no adapters, or is folded already.
    """
    modules = pruned_modules(model)
    for name, module in modules.items():
        if module._nm_low_rank is None:
            raise EmbedError(f"{name} has no adapter; call add_low_rank(model, rank) first.")
    # A call that ran out of memory may have folded some.
    left_over = [module for module in modules.values() if module._nm_low_rank.folded is None]
    if not left_over:
        raise EmbedError(f"{next(iter(modules))} is folded already.")
    pruned_now = 0
    for module in left_over:
        layout, low_rank = module._nm_layout, module._nm_low_rank
        left, codes = module._parameters[LEFT].detach(), low_rank.codes
        if codes is None:
            pruned_now += 1
            left, codes = low_rank.pruned(left)
        both = nn.Parameter(torch.cat([values_of(module), left]).to(layout.dtype), requires_grad=False)
        right = nn.Parameter(module._parameters[RIGHT].detach().to(layout.dtype), requires_grad=False)
        low_rank.folded = torch.cat([layout.codes, codes])
        layout.freeze()
        low_rank.share_with(layout)
        note_carried(both, layout.name)
        for attribute in (VALUES, LEFT, RIGHT):
            note_replaced(module._parameters[attribute], layout.name)
        for owner in sharing(model, layout):
            del owner._parameters[LEFT]
            owner._parameters[VALUES], owner._parameters[RIGHT] = both, right
    if pruned_now:
        log.warning(
            "%d adapters were pruned when they were folded: this is another model than was trained.", pruned_now
        )
    return model
