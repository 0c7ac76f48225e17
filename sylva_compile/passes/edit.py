"""Small helpers that passes share: new nodes with the metadata they may carry, and what depends on the backward."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from sylva_compile.passes.match_weight_gradient import Operand, Scale


def call(
    graph: Graph, target: Any, *args: Any, like: Node | None = None, kwargs: Mapping[str, Any] | None = None
) -> Node:
    """Insert `target(*args, **kwargs)` at the graph's insertion point.

    Only `meta["val"]` is set: other keys (`eager_input_vals` above all) describe the node they were made for, and
    Inductor believes them. `like` names a node whose place in a checkpointed region the new one shares.
    """
    named = dict(kwargs or {})
    node = graph.call_function(target, args, named)
    values, named_values = map_arg((args, named), lambda argument: argument.meta["val"])
    with _fake_mode_of([*args, *named.values()]):
        node.meta["val"] = target(*values, **named_values)
    if like is not None:
        for key in ("recompute", "ac_graph_id"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    return node


def _fake_mode_of(args: Iterable[Any]) -> Any:
    for argument in args:
        if isinstance(argument, Node):
            held = argument.meta["val"]
            if isinstance(held, torch.SymInt):
                return nullcontext()
            return (held[0] if isinstance(held, list) else held).fake_mode
        if isinstance(argument, list) and isinstance(argument[0], Node):
            return _fake_mode_of(argument)
    raise AssertionError("a new node needs at least one node among its arguments")


def materialize(graph: Graph, operand: Operand, like: Node | None = None) -> Node:
    """The operand as a node, with the transpose that it still needs; `like` as for `call`."""
    if not operand.transposed:
        return operand.node
    return call(graph, torch.ops.aten.permute.default, operand.node, [1, 0], like=like)


def apply_scales(graph: Graph, blocks: Node, scales: Iterable[Scale]) -> Node:
    """Multiply sampled blocks as the dense gradient was; innermost factors come last in `scales`."""
    for scale in reversed(tuple(scales)):
        args = (blocks,) if scale.factor is None else (blocks, scale.factor)
        blocks = call(graph, scale.target, *args)
    return blocks


def tangent_dependents(graph: Graph) -> set[Node]:
    """The nodes that need a gradient from outside: the backward half of a joint graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def backward_half(graph: Graph) -> set[Node]:
    """What a joint graph computes for the backward alone: gradients, and what only they need.

    The latter depends on no gradient, such as the derivative of an activation function.
    """
    late = tangent_dependents(graph) - {graph.output_node()}
    outputs = [node for node in graph.output_node().all_input_nodes if node not in late]
    needed: set[Node] = set()
    while outputs:
        node = outputs.pop()
        if node not in needed:
            needed.add(node)
            outputs += node.all_input_nodes
    return {node for node in graph.nodes if node in late or (node.op == "call_function" and node not in needed)}
