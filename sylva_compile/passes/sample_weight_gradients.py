"""Stage 2: turn `gather_blocks(dense weight gradient)` into `sddmm`, and save only the activations that it reads.

Before:

    %mm     = aten.mm(aten.t(%gy), %x)                           dense [m, n]
    %blocks = sylva.gather_blocks(%mm, %positions, %lines, %narrow_positions, b, 1)

After:

    %x_narrow = aten.index(%x, [None, %lines])                   in the forward half: this is what gets saved
    %blocks   = sylva.sddmm(%gy, %x_narrow, %narrow_positions, b)

The operand that does not depend on a tangent is the activation. It is narrowed along the weight's input axis unless
the lines cover more than `WIDE` of it. A sum of products becomes a sum of sampled products.

Refuses (and says so in the outcome): a gradient with a term that the matcher leaves opaque. That term stays dense and
is sampled by `gather_blocks`, correct and slow; the other terms are rewritten.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm import sddmm
from sylva_compile.passes.edit import apply_scales, call, materialize, tangent_dependents
from sylva_compile.passes.match_weight_gradient import Operand, Term, match_weight_gradient

aten = torch.ops.aten
GATHER = gather_blocks._opoverload
SDDMM = sddmm._opoverload

WIDE = 0.9
"""Above this share of an activation, a narrow copy would be nearly the whole: keep the activation itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of one `gather_blocks`: the node of its `positions`, and why it stayed dense (None: rewritten)."""

    positions: Node
    reason: str | None
    narrowed: bool


def sample_weight_gradients_pass(graph: Graph, *, report: Callable[[Outcome], None] | None = None) -> int:
    """Rewrite every `gather_blocks` of a joint `graph` in place; returns how many changed, in full or in part."""
    markers = graph.find_nodes(op="call_function", target=GATHER)
    if not markers:
        return 0
    backward = tangent_dependents(graph)
    rewritten = 0
    for marker in markers:
        gradient, positions = marker.args[:2]
        assert isinstance(gradient, Node) and isinstance(positions, Node)
        terms = match_weight_gradient(gradient)
        missed = [term.reason for term in terms if term.reason is not None]
        narrowed = False
        if len(missed) < len(terms):
            narrowed = _rewrite(graph, marker, terms, backward)
        rewritten += len(missed) < len(terms)
        if report is not None:
            report(Outcome(positions, missed[0] if missed else None, narrowed))
    graph.eliminate_dead_code()
    graph.lint()
    return rewritten


def _rewrite(graph: Graph, marker: Node, terms: list[Term], backward: set[Node]) -> bool:
    total: Node | None = None
    narrowed = False
    for term in terms:
        if term.reason is not None:
            with graph.inserting_before(marker):
                blocks = call(graph, GATHER, materialize(graph, term.lhs), *marker.args[1:])
        else:
            blocks, narrow = _sample(graph, marker, term, backward)
            narrowed |= narrow
        with graph.inserting_before(marker):
            blocks = apply_scales(graph, blocks, term.scales)
            total = blocks if total is None else call(graph, aten.add.Tensor, total, blocks)
    assert total is not None
    wanted = marker.meta["val"].dtype
    if total.meta["val"].dtype != wanted:
        # A product in float32 whose gradient was then cast to float64, or the reverse.
        with graph.inserting_before(marker):
            total = call(graph, torch.ops.prims.convert_element_type.default, total, wanted)
    marker.replace_all_uses_with(total)
    graph.erase_node(marker)
    return narrowed


def _sample(graph: Graph, marker: Node, term: Term, backward: set[Node]) -> tuple[Node, bool]:
    positions, lines, narrow_positions, block_size, axis = marker.args[1:]
    assert term.rhs is not None and isinstance(lines, Node)
    operands = [term.lhs, term.rhs]
    activation = operands[axis]  # type: ignore[index]
    narrow = activation.node not in backward and _is_narrow(activation, lines)
    if narrow:
        positions = narrow_positions
        with graph.inserting_after(_later(activation.node, lines)):
            whole = materialize(graph, activation, like=activation.node)
        with graph.inserting_after(_later(whole, lines)):
            taken = call(graph, aten.index.Tensor, whole, [None, lines], like=activation.node)
        operands[axis] = Operand(taken)  # type: ignore[index]
    with graph.inserting_before(marker):
        left, right = (materialize(graph, operand) for operand in operands)
        return call(graph, SDDMM, left, right, positions, block_size), narrow


def _is_narrow(activation: Operand, lines: Node) -> bool:
    width = activation.node.meta["val"].shape[0 if activation.transposed else 1]
    kept = lines.meta["val"].shape[0]
    # The width of a layer is static; a count of lines that is not is the mark of unequal masks that share this graph.
    return not isinstance(kept, int) or not isinstance(width, int) or kept <= WIDE * width


def _later(first: Node, second: Node) -> Node:
    later = second if first < second else first
    # Inputs of the graph stay together in front.
    while later.op == "placeholder" and later.next.op == "placeholder":
        later = later.next
    return later
