"""Merge the sampled products that read one activation into a single launch.

A product of few blocks does not fill a device; the products of several weights together do.

Before:

    %a = sylva.sddmm(%gy_a, %x, %positions_a, b)
    %c = sylva.sddmm(%gy_c, %x, %positions_c, b)

After:

    %ac = sylva.sddmm_shared([%gy_a, %gy_c], %x, [%positions_a, %positions_c], b)
    %a  = getitem(%ac, 0)
    %c  = getitem(%ac, 1)

Refuses: products with a product of another activation between them, because the output gradients of the early ones
would stay in memory until the last one exists; products of which one is read before the operands of another exist;
output gradients of unequal dtype; products with unequal gates.
"""

import itertools
import operator
from collections.abc import Sequence

from torch.fx import Graph, Node

from sylva_compile._torch import operator_of
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes.edit import call

SHARED = operator_of(sddmm_shared)


def merge_products(graph: Graph, products: Sequence[Node]) -> int:
    """Merge neighbouring `sddmm` nodes that read one activation; return how many nodes fewer there are.

    Args:
        graph: graph to rewrite in place.
        products: its `sddmm` nodes, in any order.
    """
    merged = 0
    for _, run in itertools.groupby(sorted(products), key=_shared_part):
        group = list(run)
        if len(group) > 1 and not any(user < group[-1] for product in group for user in product.users):
            _merge(graph, group)
            merged += len(group) - 1
    return merged


def _shared_part(product: Node) -> tuple[object, ...]:
    left, right, _, *rest = product.args
    assert isinstance(left, Node)
    return right, *rest, left.meta["val"].dtype


def _merge(graph: Graph, group: list[Node]) -> None:
    with graph.inserting_after(group[-1]):
        lefts, rights, positions, *rest = zip(*(product.args for product in group), strict=True)
        shared = call(graph, SHARED, list(lefts), rights[0], list(positions), *(each[0] for each in rest))
    after = shared
    for index, product in enumerate(group):
        with graph.inserting_after(after):
            after = call(graph, operator.getitem, shared, index)
        product.replace_all_uses_with(after)
        graph.erase_node(product)
