"""In a trace of a sharded model: hand the operands of every weight gradient to the tracer instead of multiplying them.

Before:

    %mm = aten.mm(aten.t(%gy), %x)
    %seen = sylva.probe(%mm, %leaf)
    return (..., %seen, ...)                                     the gradient of the weight's probe, %leaf

After:

    %zero = sylva.observe(%gy, %x, %leaf, False)
    return (..., %zero, ...)

Here the weights are frozen, and no output of the graph is a weight's gradient. The probe stands for the weight at run
time.

Refuses: a gradient with an opaque term (the op stays, and tells at run time that the gradient was not observed).
"""

from collections.abc import Callable

from torch.fx import Graph, Node

from sylva_compile._torch import operator_of
from sylva_compile.kernels.probe import probe
from sylva_compile.passes.dataflow import dataflow_of, tangent_dependents
from sylva_compile.passes.match_weight_gradient import match_weight_gradient
from sylva_compile.passes.observe_weight_gradients import observe_terms

PROBE = operator_of(probe)


def observe_probes_pass(graph: Graph, *, missed: Callable[[Node, str], None] | None = None) -> int:
    """Rewrite a joint `graph` in place and return the number of weights observed.

    Args:
        graph: joint graph of forward and backward.
        missed: called with the probe of a weight that cannot be observed, and the reason.
    """
    probes = graph.find_nodes(op="call_function", target=PROBE)
    backward = tangent_dependents(dataflow_of(graph)) if probes else set()
    observed = 0
    for node in probes:
        gradient, leaf = node.args
        assert isinstance(gradient, Node) and isinstance(leaf, Node)
        terms = match_weight_gradient(gradient)
        reason = next((term.reason for term in terms if term.reason is not None), None)
        if reason is not None:
            if missed is not None:
                missed(leaf, reason)
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(observe_terms(graph, terms, leaf, backward))
        graph.erase_node(node)
        observed += 1
    if observed:
        graph.eliminate_dead_code()
        graph.lint()
    return observed
