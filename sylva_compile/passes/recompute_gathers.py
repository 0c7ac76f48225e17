"""Let the backward gather the tokens of experts again, in place of saving a copy of each token for each of its experts.

Before:

    %rows   = aten.index(%hidden, [%order])                      [S, n], k copies of every token: saved
    %blocks = sylva.grouped_sddmm(%gy, %rows, %positions, %offsets, b)

After: the same nodes, with %rows marked so that the partitioner computes it again from %hidden, which the backward has
or computes from a norm's input. A frozen model saves no copy of these rows either. A narrow copy of %rows is made from
it and inherits the mark.

Refuses: rows that depend on a gradient; rows that another operator of the backward reads, for which they are saved in
any case; nodes that a checkpoint has marked already.
"""

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from sylva_compile.passes.dataflow import backward_half, dataflow_of
from sylva_compile.passes.narrow_copy import CASTS, VIEWS

aten = torch.ops.aten


def recompute_gathers(graph: Graph, products: Iterable[Node], activations: Iterable[Node]) -> int:
    """Mark the gathers of a joint `graph` and return how many there are.

    Args:
        graph: joint graph.
        products: all sampled products.
        activations: the activations of grouped products.
    """
    gathers = {gather for activation in activations if (gather := _gather_of(activation)) is not None}
    if not gathers:
        return 0
    backward = backward_half(dataflow_of(graph))
    readers = backward - set(products)
    marked = 0
    for gather in gathers:
        if gather not in backward and "recompute" not in gather.meta and not _is_read(gather, readers):
            gather.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            marked += 1
    return marked


def _gather_of(activation: Node) -> Node | None:
    """Return the gather of whole rows that `activation` is a view or a cast of, or None."""
    node = activation
    while node.target in VIEWS | CASTS:
        node = node.all_input_nodes[0]
    if node.target is not aten.index.Tensor:
        return None
    _, indices = node.args
    is_rows = isinstance(indices, list | tuple) and len(indices) == 1 and isinstance(indices[0], Node)
    return node if is_rows and node.meta["val"].dim() == 2 else None


def _is_read(node: Node, readers: set[Node]) -> bool:
    return any(user in readers or (user.target in VIEWS | CASTS and _is_read(user, readers)) for user in node.users)
