"""Stage 2: turn `gather_blocks(dense weight gradient)` into `sddmm`, which reads only what the blocks need.

Before:

    %mm     = aten.mm(aten.t(%gy), %x)                           dense [m, n]
    %blocks = sylva.gather_blocks(%mm, %positions, %channels, %narrow_positions, b, 1)

After:

    %x_narrow = aten.index(%x, [None, %channels])                   in the forward half: this is what gets saved
    %blocks   = sylva.sddmm(%gy, %x_narrow, %narrow_positions, b)

A sum of products becomes a sum of sampled products. When `%x` is not cut down is the rule of `narrow_activations.py`;
products of one activation are then computed together, see `merge_products.py`.

Refuses (and says so in the outcome): a gradient with a term that the matcher leaves opaque. That term stays dense and
is sampled by `gather_blocks`, correct and slow; the other terms are rewritten.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.passes.edit import apply_scales, call, materialize
from sylva_compile.passes.match_weight_gradient import Term, match_weight_gradient
from sylva_compile.passes.merge_products import merge_products
from sylva_compile.passes.narrow_activations import SampledProduct, narrow_activations, unify_activations

aten = torch.ops.aten
GATHER = gather_blocks._opoverload
SDDMM = sddmm._opoverload


@dataclass(frozen=True)
class RewriteResult:
    """What became of one `gather_blocks`.

    Attributes:
        positions: the node of its positions, which tells whose weight it is.
        reason: why it stayed dense, in full or in part; None if it was rewritten.
        whole: why an activation is read as a whole; None if all were narrowed.
        activations: the activations that its products read.
    """

    positions: Node
    reason: str | None = None
    whole: str | None = None
    activations: tuple[Node, ...] = ()

    @property
    def narrowed(self) -> bool:
        """Whether every activation was cut down to the channels that the blocks need."""
        return bool(self.activations) and self.whole is None


def sample_weight_gradients_pass(graph: Graph, *, report: Callable[[RewriteResult], None] | None = None) -> int:
    """Rewrite every `gather_blocks` of a joint `graph` in place; returns how many changed, in full or in part."""
    markers = graph.find_nodes(op="call_function", target=GATHER)
    if not markers:
        return 0
    found: list[tuple[Node, str | None, int]] = []
    samples: list[SampledProduct] = []
    for marker in markers:
        gradient, positions = marker.args[:2]
        assert isinstance(gradient, Node) and isinstance(positions, Node)
        terms = match_weight_gradient(gradient)
        missed = [term.reason for term in terms if term.reason is not None]
        if len(missed) < len(terms):
            samples += _rewrite(graph, marker, terms)
        found.append((positions, missed[0] if missed else None, len(samples)))
    # The dense products are gone from here on: what still reads an activation needs it for something else.
    graph.eliminate_dead_code()
    samples = unify_activations(samples)
    whole = narrow_activations(graph, samples)
    merge_products(graph, [sample.product for sample in samples])
    graph.eliminate_dead_code()
    graph.lint()
    rewritten = start = 0
    for positions, missed_reason, stop in found:
        own, start = samples[start:stop], stop
        rewritten += bool(own)
        if report is not None:
            why_whole = next((whole[sample] for sample in own if sample in whole), None)
            activations = tuple(sample.activation.node for sample in own)
            report(RewriteResult(positions, missed_reason, why_whole, activations))
    return rewritten


def _rewrite(graph: Graph, marker: Node, terms: list[Term]) -> list[SampledProduct]:
    """Replace `marker` by the sum of its sampled terms, which read their activations whole."""
    positions, channels, narrow_positions, block_size, axis = marker.args[1:]
    assert isinstance(channels, Node) and isinstance(narrow_positions, Node)
    assert isinstance(block_size, int) and isinstance(axis, int)
    total: Node | None = None
    samples = []
    with graph.inserting_before(marker):
        for term in terms:
            if term.rhs is None:
                blocks = call(graph, GATHER, materialize(graph, term.lhs), *marker.args[1:])
            else:
                operands = (term.lhs, term.rhs)
                left, right = (materialize(graph, operand) for operand in operands)
                blocks = call(graph, SDDMM, left, right, positions, block_size)
                samples.append(SampledProduct(blocks, operands[axis], axis, channels, narrow_positions, block_size))
            blocks = apply_scales(graph, blocks, term.scales)
            total = blocks if total is None else call(graph, aten.add.Tensor, total, blocks)
        assert total is not None
        wanted = marker.meta["val"].dtype
        if total.meta["val"].dtype != wanted:
            # A product in float32 whose gradient was then cast to float64, or the reverse.
            total = call(graph, torch.ops.prims.convert_element_type.default, total, wanted)
    marker.replace_all_uses_with(total)
    graph.erase_node(marker)
    return samples
