"""In a trace: hand the operands of every weight gradient to the tracer instead of multiplying them.

Before:

    %mm = aten.mm(aten.t(%gy), %x)
    return (..., %mm, ...)                                       the gradient of %weight

After:

    %zero = sylva.observe(%gy, %x, %weight, False)
    %none = aten.expand(%zero, [m, n])                           a gradient of zeros that takes no memory
    return (..., %none, ...)

The tracer gets the weight itself at run time, because one compiled graph may serve several layers. For the stacked
weights `[E, m, n]` of experts it gets the offsets of their tokens too:

    %zero = sylva.observe(%gy, %x, %weight, False, %offsets)

Refuses: a gradient with an opaque term (the weight keeps its dense gradient, and the pass reports it as missed); a
parameter that is neither a matrix nor a stack of them; an activation that another graph hands over, although its
gradient is a product too.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from sylva_compile._torch import GradAOTOutput, operator_of
from sylva_compile.kernels.observe import observe
from sylva_compile.passes.dataflow import dataflow_of, tangent_dependents
from sylva_compile.passes.edit import apply_scales, call, materialize, unbatched
from sylva_compile.passes.keep_input_gradients import keep_input_gradients
from sylva_compile.passes.match_weight_gradient import Term, match_weight_gradient

aten = torch.ops.aten
OBSERVE = operator_of(observe)


def observe_weight_gradients_pass(
    graph: Graph,
    *,
    is_weight: Callable[[Node], bool] | None = None,
    missed: Callable[[Node, str], None] | None = None,
) -> int:
    """Rewrite a joint `graph` in place and return the number of weights observed.

    Args:
        graph: joint graph whose placeholders and output carry AOTAutograd's `desc`.
        is_weight: tells weights from other placeholders with gradients, such as activations; None accepts all.
        missed: called with the placeholder of a weight that cannot be observed, and the reason.
    """
    output = graph.output_node()
    inputs = {node.meta.get("desc"): node for node in graph.find_nodes(op="placeholder")}
    backward = tangent_dependents(dataflow_of(graph))
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    observed = 0
    for index, desc in enumerate(output.meta["desc"]):
        gradient = results[index]
        if not isinstance(desc, GradAOTOutput) or not isinstance(gradient, Node):
            continue
        weight = inputs.get(desc.grad_of)
        if (
            weight is None
            or weight.meta["val"].dim() not in (2, 3)
            or (is_weight is not None and not is_weight(weight))
        ):
            continue
        terms = match_weight_gradient(gradient)
        reason = next((term.reason for term in terms if term.reason is not None), None)
        if reason is not None:
            if missed is not None:
                missed(weight, reason)
            continue
        with graph.inserting_before(output):
            zero = observe_terms(graph, terms, weight, backward)
            results[index] = call(graph, aten.expand.default, zero, list(weight.meta["val"].shape))
        observed += 1
    if observed:
        output.args = (tuple(results),)
        graph.eliminate_dead_code()
        keep_input_gradients(graph)
        graph.lint()
    return observed


def observe_terms(graph: Graph, terms: Iterable[Term], weight: Node, backward: Collection[Node]) -> Node:
    """Insert the calls of `sylva::observe` for products that make up a gradient, and return the node of their zero.

    Args:
        graph: graph to insert into, at its insertion point.
        terms: the products; none is opaque.
        weight: stands for the weight at run time; an input of the graph.
        backward: the nodes that depend on a gradient from outside.
    """
    zero: Node | None = None
    for term in terms:
        side = 0 if term.lhs.node in backward else 1
        term = unbatched(graph, term, weight)
        assert term.rhs is not None
        # The layer's input must stay as it is, so the output gradient takes the scalar factors.
        sides = [term.lhs, term.rhs]
        nodes = [materialize(graph, operand) for operand in sides]
        nodes[side] = apply_scales(graph, nodes[side], term.scales)
        more = () if term.offsets is None else (term.offsets,)
        seen = call(graph, OBSERVE, *nodes, weight, side == 1, *more)
        zero = seen if zero is None else call(graph, aten.add.Tensor, zero, seen)
    assert zero is not None
    return zero
