"""What a joint graph teaches about layouts before code is generated for it, and the second trace that makes use of it.

Two things of a mask cannot be known before a graph has been seen, and both change what the graph takes as inputs:

* **which weights read the same activation**: they get one tensor of input lines, so that one narrow copy serves all;
* **that a graph will serve several layers** whose masks differ in size: their sizes are marked as ones that vary, so
  that all share one artifact.

So the first trace of a graph may only teach, and Dynamo is asked to trace it again. That costs a trace and no code
generation, and happens once for all layers that are alike: what is learnt of one is applied to its peers, the weights
whose names differ in numbers only. What is learnt is about speed; a peer for which it is not so is computed rightly.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from sylva_compile.blocks.layout import share_input_channels
from sylva_compile.blocks.site import BlockState
from sylva_compile.passes.sample_weight_gradients import RewriteResult

log = logging.getLogger(__name__)


class TraceAgain(ShortenTraceback, RestartAnalysis):
    """Dynamo traces the frame again, with the layouts as they are now."""


def update_layouts(
    sites: Mapping[str, BlockState],
    settled: Set[str],
    found: Sequence[tuple[RewriteResult, object]],
    gm: GraphModule,
    example_inputs: Sequence[Any],
) -> None:
    """Let layouts follow what a joint graph shows.

    Args:
        sites: every embedded weight of the model by name.
        settled: those that a compiled graph has trained already; nothing is concluded for them from another layer, for
            a step may be under way whose checkpointed layers will run again.
        found: the outcome of each weight of the graph, with the tensor of its positions.
        gm: Dynamo's graph.
        example_inputs: the arguments that it is compiled for.

    Raises:
        TraceAgain: to Dynamo, when a layout changed.
    """
    if TracingContext.try_get() is None:
        return
    by_positions = {id(site.layout.positions): name for name, site in sites.items()}
    names = {outcome: by_positions.get(id(positions)) for outcome, positions in found}
    inside = {name for name in names.values() if name is not None}
    reasons = []
    # The passes run in the midst of a trace of fake tensors; layouts hold real ones.
    with _disable_current_modes():
        if _share(sites, settled, _readers_of_one_activation(names)):
            reasons.append("weights that read one activation share its narrow copy")
        if _let_sizes_vary(sites, inside):
            _let_blocks_vary(gm, example_inputs, [sites[name] for name in inside])
            reasons.append("layers with unequal masks share the graph")
    if reasons:
        reason = " and ".join(reasons)
        log.info("traced again: %s", reason)
        raise TraceAgain(first_useful_frame=None, restart_reason=reason)


def _readers_of_one_activation(names: Mapping[RewriteResult, str | None]) -> list[set[str]]:
    readers: dict[Node, set[str]] = {}
    for outcome, name in names.items():
        for activation in outcome.activations if name is not None else ():
            readers.setdefault(activation, set()).add(name)  # type: ignore[arg-type]
    return [group for group in readers.values() if len(group) > 1]


def _share(sites: Mapping[str, BlockState], settled: Set[str], groups: Iterable[set[str]]) -> bool:
    """Let each group, and the groups that are alike in other layers, share their lines."""
    changed = False
    for group in groups:
        for peers in _alike(sites, settled, group):
            # Whoever shares with one of them already goes on sharing: groups only grow, so this comes to an end.
            lines = {id(sites[name].layout.input_channels) for name in peers}
            members = [site for name, site in sites.items() if name in peers or id(site.layout.input_channels) in lines]
            changed |= share_input_channels([site.layout for site in members])
    return changed


def _alike(sites: Mapping[str, BlockState], settled: Set[str], group: set[str]) -> list[set[str]]:
    """`group` and, where its members are of one layer, the sets of the same weights in other layers."""
    if len({_numbers(name) for name in group}) > 1:
        return [group]
    patterns = {_pattern(name) for name in group}
    layers: dict[tuple[str, ...], set[str]] = {}
    for name in sites:
        if _pattern(name) in patterns:
            layers.setdefault(_numbers(name), set()).add(name)
    return [layer for layer in layers.values() if layer == group or (len(layer) > 1 and not layer & settled)]


def _let_sizes_vary(sites: Mapping[str, BlockState], inside: set[str]) -> bool:
    """Mark the sizes of weights `inside` a graph whose peers lie outside of it and differ from them."""
    changed = False
    patterns = [_pattern(name) for name in inside]
    if len(set(patterns)) < len(patterns):
        # Several layers in one graph: a piece of a model that is compiled as a whole. Symbols would cost there.
        return False
    for name in inside:
        peers = [site for other, site in sites.items() if _pattern(other) == _pattern(name)]
        same = [site for site in peers if site.mask.shape == sites[name].mask.shape]
        if len({site.layout.sizes for site in same}) > 1:
            marked = [site.layout.let_sizes_vary() for site in same]
            changed |= any(marked)
    return changed


def _let_blocks_vary(gm: GraphModule, example_inputs: Sequence[Any], sites: Iterable[BlockState]) -> None:
    """Let the number of trainable blocks vary too: Dynamo takes a Parameter's shape as fixed unless told by name."""
    blocks = {id(site.blocks) for site in sites}
    listed = [name for name in torch.compiler.config.dynamic_sources.split(",") if name]
    for placeholder, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, Tensor) and id(value) in blocks:
            name = placeholder.meta["grapharg"].source.name
            listed.append(name() if callable(name) else name)
    torch.compiler.config.dynamic_sources = ",".join(dict.fromkeys(listed))


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?<![^.])\d+(?![^.])", name))


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
