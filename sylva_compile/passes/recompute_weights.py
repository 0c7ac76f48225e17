"""Let the backward half make quantised weights again, in the place of keeping dense copies for it.

Before:

    %dense  = bitsandbytes.dequantize_4bit(%packed, ...)
    %weight = aten.index_put(%dense, [%rows of blocks], %blocks)     saved for the backward pass: a dense copy
    %t      = aten.t(%weight)

After: the same nodes, from the dequantisation to the views of `%weight`, with `meta["recompute"] = MUST_RECOMPUTE`.
The partitioner puts a second copy of them into the backward graph, as it does for checkpointed regions, and saves what
they read: the packed weight and the blocks, which are there in any case. They get no `ac_graph_id`, so that they are no
part of a checkpointed region.

A weight is known by the positions of its blocks, inputs of the graph on which the index depends. Refuses nothing, and
leaves alone what depends on a gradient from outside.
"""

from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from sylva_compile._torch import operator_of
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.passes.dataflow import dataflow_of, tangent_dependents
from sylva_compile.passes.narrow_copy import CASTS, VIEWS

aten = torch.ops.aten
GATHER = operator_of(gather_blocks)
WRITE = aten.index_put.default


def recompute_weights_pass(graph: Graph, *, is_positions: Callable[[Node], bool] | None = None) -> int:
    """Tag the quantised weights of a joint `graph` in place and return their number.

    Args:
        graph: joint graph.
        is_positions: tells the inputs that are positions of blocks in a quantised weight, beside those that gradients
            of blocks read: blocks that are frozen have no gradient.
    """
    writes = graph.find_nodes(op="call_function", target=WRITE)
    if not writes:
        return 0
    known = {marker.args[1] for marker in graph.find_nodes(op="call_function", target=GATHER)}
    if is_positions is not None:
        known |= {node for node in graph.find_nodes(op="placeholder") if is_positions(node)}
    gradients = tangent_dependents(dataflow_of(graph))
    tagged = 0
    for write in writes:
        if write in gradients or write.meta.get("recompute") is not None or not _reads(write.args[1], known):
            continue
        for node in {*_makes(write), *_views(write)} - gradients:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        tagged += 1
    return tagged


def _reads(indices: object, known: set[object]) -> bool:
    """Whether the index of a write depends on a node in `known`."""
    assert isinstance(indices, list | tuple)
    return any(source in known for index in indices if isinstance(index, Node) for source in _ancestors(index))


def _makes(node: Node) -> Iterator[Node]:
    """Yield `node` and every operator that it depends on."""
    return (source for source in _ancestors(node) if source.op == "call_function")


def _views(node: Node) -> Iterator[Node]:
    """Yield the views and casts of `node`, and theirs."""
    for user in node.users:
        if user.target in VIEWS or user.target in CASTS:
            yield user
            yield from _views(user)


def _ancestors(node: Node) -> list[Node]:
    """Return `node` and every node that it depends on."""
    found = {node: None}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found[source] = None
                waiting.append(source)
    return list(found)
