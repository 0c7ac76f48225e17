"""Update the layouts of a model from its joint graph, and have Dynamo trace the frame again where they changed.

Two properties of a model show only in a joint graph, and both change the inputs that the graph takes:

* **which weights read the same activation**: they get one tensor of input channels, so that one narrow copy of the
  activation serves all of them;
* **whether several layers will share one graph** although their masks differ in size: `update_layouts` tells Dynamo
  that these sizes vary, so that all layers share one compiled graph.

So the backend may raise TraceAgain from the first trace of a graph, before any code is generated, and Dynamo traces the
frame again. All layers that are alike cost one further trace together: `update_layouts` also updates the layouts of a
weight's peers, the weights whose names differ in numbers only. Layouts affect speed alone: gradients of a peer that
reads other activations are correct too.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch.fx import GraphModule, Node

from sylva_compile._torch import RestartAnalysis, ShortenTraceback, TracingContext, disable_current_modes
from sylva_compile.blocks import registry
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.layout import share_input_channels
from sylva_compile.blocks.scope import layer_numbers
from sylva_compile.passes.sample_weight_gradients import RewriteResult

log = logging.getLogger(__name__)

States = Mapping[str, BlockState]


class TraceAgain(ShortenTraceback, RestartAnalysis):
    """Dynamo traces the frame again, with the layouts as they are now."""


def update_layouts(
    states: States,
    compiled_before: Set[str],
    results: Sequence[tuple[RewriteResult, object]],
    gm: GraphModule,
    example_inputs: Sequence[Any],
) -> None:
    """Update the layouts of a model from one of its joint graphs, or from a graph without a backward pass.

    Args:
        states: every embedded weight of the model by name.
        compiled_before: names of the weights that a compiled graph has trained already. Their layouts do not change
            because of another layer's graph: a step may be under way whose checkpointed layers will run again.
        results: what became of each weight gradient of the graph, with the tensor of its positions; nothing where there
            is no backward pass.
        gm: Dynamo's graph.
        example_inputs: the arguments that it is compiled for.

    Raises:
        TraceAgain: to Dynamo, when a layout changed.
    """
    if TracingContext.try_get() is None:
        return
    names = {state: name for name, state in states.items()}
    found = {result: registry.state_of_positions(positions) for result, positions in results}
    named = {result: names[state] for result, state in found.items() if state is not None and state in names}
    reasons = []
    # Passes run while Dynamo traces fake tensors; layouts hold real ones.
    with disable_current_modes():
        if _share_channels(states, compiled_before, _readers_of_one_activation(named)):
            reasons.append("weights that read one activation share its narrow copy")
        given = {id(value) for value in example_inputs}
        # An evaluation has no results, but where weights are quantised it reads blocks.
        inside = set(named.values()) | {name for name, state in states.items() if id(state.blocks) in given}
        if _let_sizes_vary(gm, example_inputs, states, inside):
            reasons.append("layers with unequal masks share the graph")
    if reasons:
        reason = " and ".join(reasons)
        log.info("traced again: %s", reason)
        raise TraceAgain(first_useful_frame=None, restart_reason=reason)


def _readers_of_one_activation(names: Mapping[RewriteResult, str]) -> list[set[str]]:
    """Return the sets of weights that read one activation together."""
    readers: dict[Node, set[str]] = {}
    for result, name in names.items():
        for activation in result.activations:
            readers.setdefault(activation, set()).add(name)
    return [group for group in readers.values() if len(group) > 1]


def _share_channels(states: States, compiled_before: Set[str], groups: Iterable[set[str]]) -> bool:
    """Let each group, and the same weights of other layers, share their input channels; return whether any changed."""
    changed = False
    for group in groups:
        for layer in _same_in_all_layers(states, compiled_before, group):
            # Weights that share with one of the group already go on sharing: groups only grow, so this ends.
            shared = {id(states[name].layout.input_channels) for name in layer}
            members = [
                state for name, state in states.items() if name in layer or id(state.layout.input_channels) in shared
            ]
            changed |= share_input_channels([state.layout for state in members])
    return changed


def _same_in_all_layers(states: States, compiled_before: Set[str], group: set[str]) -> list[set[str]]:
    """Return `group` and, where all of its weights are of one layer, the sets of the same weights in other layers."""
    if len({layer_numbers(name) for name in group}) > 1:
        return [group]
    patterns = {_pattern(name) for name in group}
    layers: dict[tuple[str, ...], set[str]] = {}
    for name in states:
        if _pattern(name) in patterns:
            layers.setdefault(layer_numbers(name), set()).add(name)
    return [layer for layer in layers.values() if layer == group or (len(layer) > 1 and not layer & compiled_before)]


def _let_sizes_vary(gm: GraphModule, example_inputs: Sequence[Any], states: States, inside: Set[str]) -> bool:
    """Let the sizes of weights `inside` the graph vary if their peers outside have others; return whether that is new.

    In a copied model the index tensors are marked already, but `dynamic_sources` does not list its blocks yet.
    """
    patterns = [_pattern(name) for name in inside]
    if len(set(patterns)) < len(patterns):
        # The graph holds several layers: it is a piece of a model that is compiled whole, where symbols would cost.
        return False
    peers = [state for name in inside for state in _unequal_peers(states, name)]
    marked = [state.layout.mark_sizes_dynamic() for state in peers]
    if not any(marked) and all(map(registry.blocks_vary, peers)):
        return False
    named = []
    for placeholder, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if any(states[name].blocks is value for name in inside):
            source = placeholder.meta["grapharg"].source.name
            named.append(registry.let_blocks_vary(states.values(), source() if callable(source) else source))
    return any(marked) or any(named)


def _unequal_peers(states: States, name: str) -> list[BlockState]:
    """Return the weight `name` and its peers of one shape, if their numbers of blocks or input channels differ."""
    peers = [
        state
        for other, state in states.items()
        if _pattern(other) == _pattern(name) and state.mask.shape == states[name].mask.shape
    ]
    return peers if len({state.layout.sizes for state in peers}) > 1 else []


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
