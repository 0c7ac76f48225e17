"""In training, before a move: replace `block_norms(dense gradient)` by a sketch that needs no dense gradient.

Before:

    %mm    = aten.mm(aten.t(%gy), %x)                            dense [m, n]
    %norms = sylva.block_norms(%mm, b, True)

After:

    %xs    = sylva.pool_squares(%x, b)                           [T, n/b], in the forward half, which saves it
    %gs    = sylva.pool_squares(%gy, b)                          [T, m/b]
    %norms = aten.mm(aten.t(%gs), %xs)

A block's squared norm is `Σₜₛ ⟨gyₜ[r], gyₛ[r]⟩⟨xₜ[c], xₛ[c]⟩` over pairs of tokens. The sketch keeps the pairs of a
token with itself. It takes 1/b² of the arithmetic of the dense product, and the forward saves one number for b columns
of the activation. A sum of products becomes a sum of sketches, as if gradients of different uses were orthogonal too.

Refuses a gradient with a term that the matcher leaves opaque: it stays dense, and its norms are exact.
"""

import torch
from torch.fx import Graph, Node

from sylva_compile._torch import operator_of
from sylva_compile.kernels.block_norms import block_norms, pool_squares
from sylva_compile.passes.edit import apply_scales, call, materialize
from sylva_compile.passes.match_weight_gradient import Term, match_weight_gradient

aten = torch.ops.aten
NORMS = operator_of(block_norms)
POOL = operator_of(pool_squares)


def sketch_block_norms_pass(graph: Graph) -> int:
    """Rewrite every `block_norms` of a joint `graph` that asks for a sketch; return how many were rewritten."""
    rewritten = 0
    for marker in graph.find_nodes(op="call_function", target=NORMS):
        gradient, block_size, sketch = marker.args
        assert isinstance(gradient, Node) and isinstance(block_size, int)
        if not sketch:
            continue
        # The matcher takes a gradient that two nodes read as one that exists in any case.
        marker.update_arg(0, next(iter(graph.nodes)))
        terms = match_weight_gradient(gradient)
        if any(term.rhs is None or term.offsets is not None or term.batched for term in terms):
            marker.update_arg(0, gradient)
            continue
        with graph.inserting_before(marker):
            marker.replace_all_uses_with(_sketch(graph, terms, block_size))
        graph.erase_node(marker)
        rewritten += 1
    if rewritten:
        graph.lint()
    return rewritten


def _sketch(graph: Graph, terms: list[Term], block_size: int) -> Node:
    total: Node | None = None
    for term in terms:
        assert term.rhs is not None
        left, right = (call(graph, POOL, materialize(graph, operand), block_size) for operand in (term.lhs, term.rhs))
        norms = call(graph, aten.mm.default, call(graph, aten.permute.default, left, [1, 0]), right)
        # A scale of the gradient counts twice in a square.
        norms = apply_scales(graph, apply_scales(graph, norms, term.scales), term.scales)
        total = norms if total is None else call(graph, aten.add.Tensor, total, norms)
    assert total is not None
    return total
