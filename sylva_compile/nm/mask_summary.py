"""The table of a model's N:M masks that `NMMasks.summary` prints."""

from collections.abc import Mapping
from typing import Any

import torch

from sylva_compile.kernels.nm.choice import choose_kernel
from sylva_compile.kernels.nm_transpose import nm_transpose
from sylva_compile.nm.layout import NMLayout
from sylva_compile.nm.mask import NMMask


def summary_of(masks: Mapping[str, NMMask], double: bool, present: Mapping[str, Any], tokens: int | None) -> str:
    """Return a table with a line for each weight, and the totals.

    Args:
        masks: by weight name.
        double: whether there are second masks.
        present: the pruned modules by weight name; none if the model is not pruned.
        tokens: of a pass; with it, the kernels of both products of each pruned weight are named.
    """
    width = max((len(name) for name in masks), default=6)
    title = f"{'weight':<{width}}  {'shape':>14}  {'pattern':>7}  {'kept':>7}  {'input gradient':>14}"
    lines = [title if tokens is None else f"{title}  kernels at {tokens} tokens"]
    total = kept = 0
    for name, mask in masks.items():
        size = mask.shape[0] * mask.shape[1]
        total, kept = total + size, kept + mask.nnz
        share = f"{mask.nnz / size:.1%}"
        has_second = name in present and present[name]._nm_layout.second.shape[1] > 0
        second = share if not double else f"{_density(present[name]._nm_layout):.1%}" if has_second else ""
        shape, pattern = f"{mask.shape[0]} x {mask.shape[1]}", f"{mask.n}:{mask.m}"
        line = f"{name:<{width}}  {shape:>14}  {pattern:>7}  {share:>7}  {second:>14}"
        if tokens is not None and name in present:
            line = f"{line}  {' and '.join(_kernels(present[name]._nm_layout, tokens))}"
        lines.append(line)
    lines.append(f"{len(masks)} weights, {kept:,} of {total:,} elements kept ({kept / max(total, 1):.1%}).")
    return "\n".join(lines)


def _density(layout: NMLayout) -> float:
    ones = torch.ones((layout.out_features, layout.per_row), dtype=torch.int16, device=layout.codes.device)
    inside = nm_transpose(ones, layout.codes, layout.second, layout.n, layout.m)
    return int(inside.count_nonzero()) / (layout.out_features * layout.in_features)


def _kernels(layout: NMLayout, tokens: int) -> tuple[str, str]:
    """Return the names of the kernels of the forward pass and of the input gradient."""
    out, size, pattern = layout.out_features, layout.in_features, (layout.n, layout.m)
    kind = layout.dtype, layout.codes.device
    forward = choose_kernel(tokens, out, size, *pattern, *kind).kernel
    if not layout.double:
        return forward, choose_kernel(tokens, out, size, *pattern, *kind, transposed=True).kernel
    return forward, choose_kernel(tokens, size, out, *pattern, *kind).kernel if layout.second.shape[1] else "none"
