"""`prune_masks`: the N:M masks of a model, by magnitude."""

import logging
from typing import Any

import torch
from torch import nn

from sylva_compile.blocks.fingerprint import base_fingerprint
from sylva_compile.blocks.scope import input_axis, owners_of, unwrap, weights_in_scope
from sylva_compile.blocks.share_left_out import log_share_left_out
from sylva_compile.config import Scope
from sylva_compile.errors import EmbedError, ScopeError
from sylva_compile.nm.embedding import check_can_carry, nm_modules
from sylva_compile.nm.mask import NMMask
from sylva_compile.nm.masks import NMMasks
from sylva_compile.nm.pattern import check_pattern
from sylva_compile.nm.ranks import of_first_rank
from sylva_compile.version import __version__

log = logging.getLogger(__name__)


def prune_masks(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    scope: Scope = "all-linear",
    *,
    double: bool = True,
    process_group: Any = None,
) -> NMMasks:
    """Choose which n of every m inputs each output keeps, by magnitude, for pre-training as in SLoPe.

    The model is left as it is: `backend(masks)` and `masks.embed()` prune it. From then on its forward pass uses the
    kept values, and its input gradient those that a second N:M mask along the outputs leaves of them.

    Args:
        model: the model, at the start of a training from scratch or of one that goes on.
        n: how many values of m neighbours are kept; ties go to the lower index.
        m: out of how many, 256 at most.
        scope: "all-linear" (every Linear and Conv1D but the output head), a regular expression for whole module names,
            or a list of endings of module names.
        double: False leaves the second mask out: input gradients are exact.
        process_group: the processes that train the model together: all of them call this and get the masks of the
            first. Without it, models must begin with the same weights on all of them.

    Returns:
        Masks bound to the model.

    Raises:
        ArgumentError: n and m cannot be used.
        ScopeError: nothing matches, a weight cannot be pruned, or a weight that the scope names has a size that m does
            not divide. With "all-linear" such weights are left out, and a warning names them.
        EmbedError: the model is pruned already, or carries blocks.
    """
    check_pattern(n, m)
    model = unwrap(model)
    if present := nm_modules(model):
        raise EmbedError(f"The model is pruned already ({next(iter(present))}); call unprune(model) first.")
    weights = weights_in_scope(model, scope, experts=False)
    masks, left = {}, []
    for name, weight in weights.items():
        check_can_carry(model, name, weight)
        axis = input_axis(next(owners_of(model, weight))[0])
        needed = weight.shape if double else weight.shape[axis : axis + 1]
        if any(size % m for size in needed):
            left.append(name)
            continue
        masks[name] = NMMask.by_magnitude(weight, n, m, axis)
    if left and (scope != "all-linear" or not masks):
        shape = tuple(weights[left[0]].shape)
        raise ScopeError(f"{left[0]} is {shape}, and m={m} does not divide it; leave it out of the scope.")
    if left:
        log.warning("%d weights stay dense, since m=%d does not divide their sizes: %s.", len(left), m, ", ".join(left))
    log_share_left_out(model, {name: weights[name] for name in masks})
    masks = of_first_rank(masks, process_group)
    config = {
        "n": n,
        "m": m,
        "scope": scope if isinstance(scope, str) else list(scope),
        "versions": {"torch": torch.__version__, "sylva-compile": __version__},
        "base": base_fingerprint(weights[name] for name in masks),
    }
    return NMMasks(masks, model=model, double=double, config=config)
