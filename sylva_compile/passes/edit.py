"""Helpers that several passes share: each inserts nodes and sets the metadata that these may carry."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from sylva_compile.passes.match_weight_gradient import Operand, Scale, Term


def call(
    graph: Graph, target: Any, *args: Any, like: Node | None = None, kwargs: Mapping[str, Any] | None = None
) -> Node:
    """Insert `target(*args, **kwargs)` at the insertion point of `graph` and return the new node.

    The node gets `meta["val"]` alone: other keys (`eager_input_vals` above all) describe the node they were made for,
    and Inductor relies on them.

    Args:
        graph: graph to insert into.
        target: operator of the new node.
        args: positional arguments; at least one argument, or `like`, is a node, or a list that holds one.
        like: node whose checkpointed region the new one joins; None joins none.
        kwargs: arguments by keyword.
    """
    named = dict(kwargs or {})
    node = graph.call_function(target, args, named)
    values, named_values = map_arg((args, named), lambda argument: argument.meta["val"])
    with _fake_mode_of((args, named, like)):
        node.meta["val"] = target(*values, **named_values)
    if like is not None:
        for key in ("recompute", "ac_graph_id"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    return node


def _fake_mode_of(arguments: Any) -> AbstractContextManager[Any]:
    """Return the fake mode of the first tensor among `arguments`, or a null context where all nodes are sizes."""
    nodes: list[Node] = []
    map_arg(arguments, nodes.append)
    assert nodes, "a new node needs at least one node among its arguments"
    for node in nodes:
        value = node.meta["val"]
        tensor = value[0] if isinstance(value, list) else value
        if isinstance(tensor, torch.Tensor):
            return tensor.fake_mode  # type: ignore[attr-defined,no-any-return]
    return nullcontext()


def materialize(graph: Graph, operand: Operand, like: Node | None = None) -> Node:
    """Return a node for `operand`, with a new transpose where it is marked as transposed; `like` as for `call`."""
    if not operand.transposed:
        return operand.node
    axes = [*range(operand.node.meta["val"].dim())]
    axes[-2:] = axes[:-3:-1]
    return call(graph, torch.ops.aten.permute.default, operand.node, axes, like=like)


def unbatched(graph: Graph, term: Term, device_of: Node) -> Term:
    """Return `term` with matrices as operands: batched experts `[E, T, n]` become `[E·T, n]`, with offsets.

    The offsets get the device of `device_of`, an input of the graph: made like an operand, they would need it saved.
    """
    if not term.batched:
        return term
    assert term.rhs is not None
    aten = torch.ops.aten
    sides = [materialize(graph, operand) for operand in (term.lhs, term.rhs)]
    experts, tokens, _ = sides[0].meta["val"].shape
    if not isinstance(tokens, int):
        tokens = call(graph, aten.sym_size.int, sides[0], 1)
    # Inductor lowers no aten.new_full: tracing has always decomposed it before.
    at = {"dtype": torch.int32, "device": device_of.meta["val"].device}
    each = call(graph, aten.full.default, [experts], tokens, like=device_of, kwargs=at)
    offsets = call(graph, aten.cumsum.default, each, 0, kwargs={"dtype": torch.int32})
    lhs, rhs = (Operand(call(graph, aten.reshape.default, side, [-1, side.meta["val"].shape[-1]])) for side in sides)
    return replace(term, lhs=lhs, rhs=rhs, offsets=offsets, batched=False)


def apply_scales(graph: Graph, value: Node, scales: Iterable[Scale]) -> Node:
    """Apply `scales` to `value`, blocks or an operand; the last one first: `scales` lists the outermost first."""
    for scale in reversed(tuple(scales)):
        args = (value,) if scale.factor is None else (value, scale.factor)
        value = call(graph, scale.target, *args)
    return value
