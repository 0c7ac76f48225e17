"""In training: replace `gather_blocks(dense gradient)` by `sddmm`, which computes the gradients of the blocks alone.

Before:

    %mm     = aten.mm(aten.t(%gy), %x)                           dense [m, n]
    %blocks = sylva.gather_blocks(%mm, %positions, %channels, %narrow_positions, b, 1)

After:

    %x_narrow = aten.index(%x, [None, %channels])                in the forward half, which saves it instead of %x
    %blocks   = sylva.sddmm(%gy, %x_narrow, %narrow_positions, b)

The product of stacked experts becomes `sylva.grouped_sddmm`, with the offsets of their tokens. A sum of products
becomes a sum of sampled products. `narrow_activations.py` decides which products read a narrow copy of their
activation, `recompute_gathers.py` has the tokens of experts gathered again, and `merge_products.py` merges the products
that read one activation.

Refuses, and gives the reason in the result: a term that the matcher leaves opaque. That term stays dense, and
`gather_blocks` samples it: correct and slow. The other terms of the gradient are rewritten. A gradient whose blocks are
all scored (`block_norms`) exists as a whole by intent, and is sampled; that is no miss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from sylva_compile._torch import operator_of
from sylva_compile.kernels.block_norms import block_norms
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.passes.edit import apply_scales, call, materialize, unbatched
from sylva_compile.passes.keep_input_gradients import keep_input_gradients
from sylva_compile.passes.match_weight_gradient import Term, match_weight_gradient
from sylva_compile.passes.merge_products import merge_products
from sylva_compile.passes.narrow_activations import SampledProduct, narrow_activations, unify_activations
from sylva_compile.passes.recompute_gathers import recompute_gathers

aten = torch.ops.aten
GATHER = operator_of(gather_blocks)
NORMS = operator_of(block_norms)
SDDMM = operator_of(sddmm)
GROUPED = operator_of(grouped_sddmm)


@dataclass(frozen=True)
class RewriteResult:
    """Result of the pass for one `gather_blocks`, that is for one use of a weight.

    Attributes:
        positions: node of the positions of its blocks, which identifies the weight.
        reason: why its gradient stayed dense, in full or in part; None if all of it was rewritten.
        whole_reason: why one of its products reads its whole activation; None if none does.
        activations: activation of each of its products.
        scored: whether the dense gradient is there because all of its blocks are scored before a move.
    """

    positions: Node
    reason: str | None = None
    whole_reason: str | None = None
    activations: tuple[Node, ...] = ()
    scored: bool = False

    @property
    def narrowed(self) -> bool:
        """True if it has products and each reads only the channels of its activation that the blocks need."""
        return bool(self.activations) and self.whole_reason is None


def sample_weight_gradients_pass(graph: Graph, *, report: Callable[[RewriteResult], None] | None = None) -> int:
    """Rewrite every `gather_blocks` of a joint `graph` in place and return how many changed, in full or in part.

    Args:
        graph: joint graph.
        report: called with the result for each `gather_blocks`, in the order of the graph.
    """
    markers = graph.find_nodes(op="call_function", target=GATHER)
    if not markers:
        return 0
    rewrites: list[tuple[Node, str | None, slice]] = []
    scored = {norms.args[0] for norms in graph.find_nodes(op="call_function", target=NORMS)}
    products: list[SampledProduct] = []
    for marker in markers:
        gradient, positions = marker.args[:2]
        assert isinstance(gradient, Node) and isinstance(positions, Node)
        if gradient in scored:
            if report is not None:
                report(RewriteResult(positions, scored=True))
            continue
        terms = match_weight_gradient(gradient)
        dense_reasons = [term.reason for term in terms if term.reason is not None]
        first = len(products)
        if len(dense_reasons) < len(terms):
            products += _rewrite(graph, marker, terms)
        rewrites.append((positions, dense_reasons[0] if dense_reasons else None, slice(first, len(products))))
    # Without the dense products, every remaining reader of an activation needs it for another purpose.
    graph.eliminate_dead_code()
    keep_input_gradients(graph)
    products = unify_activations(products)
    grouped = [product.activation.node for product in products if product.node.target is GROUPED]
    recompute_gathers(graph, [product.node for product in products], grouped)
    whole_reasons = narrow_activations(graph, products)
    merge_products(graph, [product.node for product in products if product.node.target is SDDMM])
    graph.eliminate_dead_code()
    graph.lint()
    rewritten = 0
    for positions, dense_reason, own in rewrites:
        own_products = products[own]
        rewritten += bool(own_products)
        if report is not None:
            whole_reason = next((whole_reasons[product] for product in own_products if product in whole_reasons), None)
            activations = tuple(product.activation.node for product in own_products)
            report(RewriteResult(positions, dense_reason, whole_reason, activations))
    return rewritten


def _rewrite(graph: Graph, marker: Node, terms: list[Term]) -> list[SampledProduct]:
    """Replace the `gather_blocks` node `marker` by the sum of its sampled terms.

    Returns:
        Its sampled products, each of which still reads its whole activation.
    """
    positions, channels, narrow_positions, block_size, axis, *gate = marker.args[1:]
    assert isinstance(positions, Node) and isinstance(channels, Node) and isinstance(narrow_positions, Node)
    assert isinstance(block_size, int) and isinstance(axis, int)
    total: Node | None = None
    products = []
    with graph.inserting_before(marker):
        for term in terms:
            term = unbatched(graph, term, positions)
            if term.rhs is None:
                blocks = call(graph, GATHER, materialize(graph, term.lhs), *marker.args[1:])
            else:
                operands = (term.lhs, term.rhs)
                left, right = (materialize(graph, operand) for operand in operands)
                if term.offsets is None:
                    blocks = call(graph, SDDMM, left, right, positions, block_size, *gate)
                else:
                    blocks = call(graph, GROUPED, left, right, positions, term.offsets, block_size, *gate)
                products.append(SampledProduct(blocks, operands[axis], axis, channels, narrow_positions, block_size))
            blocks = apply_scales(graph, blocks, term.scales)
            total = blocks if total is None else call(graph, aten.add.Tensor, total, blocks)
        assert total is not None
        wanted = marker.meta["val"].dtype
        if total.meta["val"].dtype != wanted:
            # The graph cast the float32 product to a float64 gradient, or the reverse; the matcher dropped the cast.
            total = call(graph, torch.ops.prims.convert_element_type.default, total, wanted)
    marker.replace_all_uses_with(total)
    graph.erase_node(marker)
    return products
