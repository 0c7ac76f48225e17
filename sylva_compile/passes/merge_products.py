"""Compute the sampled products of one activation in one go: a device that few blocks cannot fill gets them all at once.

Before:

    %a = sylva.sddmm(%gy_a, %x, %positions_a, b)
    %c = sylva.sddmm(%gy_c, %x, %positions_c, b)

After:

    %ac = sylva.sddmm_shared([%gy_a, %gy_c], %x, [%positions_a, %positions_c], b)
    %a  = getitem(%ac, 0)
    %c  = getitem(%ac, 1)

Left alone: products between which another activation's stands, for gradients that wait long for each other would all
be held in memory; products of which one is read before another's operands exist; operands of unequal dtype.
"""

import itertools
import operator
from collections.abc import Sequence

from torch.fx import Graph, Node

from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes.edit import call

SHARED = sddmm_shared._opoverload


def merge_products(graph: Graph, products: Sequence[Node]) -> int:
    """Merge neighbours among the `sddmm` nodes `products`, given in the graph's order; returns how many vanished."""
    merged = 0
    for _, run in itertools.groupby(sorted(products), key=_shared_part):
        group = list(run)
        if len(group) > 1 and not any(user < group[-1] for product in group for user in product.users):
            _merge(graph, group)
            merged += len(group) - 1
    return merged


def _shared_part(product: Node) -> tuple[object, ...]:
    left, right, _, block_size = product.args
    assert isinstance(left, Node)
    return right, block_size, left.meta["val"].dtype


def _merge(graph: Graph, group: list[Node]) -> None:
    with graph.inserting_after(group[-1]):
        lefts, rights, positions, sizes = zip(*(product.args for product in group), strict=True)
        shared = call(graph, SHARED, list(lefts), rights[0], list(positions), sizes[0])
    after = shared
    for index, product in enumerate(group):
        with graph.inserting_after(after):
            after = call(graph, operator.getitem, shared, index)
        product.replace_all_uses_with(after)
        graph.erase_node(product)
