"""Reachability agrees with a slow search of the definition, over random graphs and over one of a known layer."""

from typing import TYPE_CHECKING

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from sylva_compile.passes.dataflow import backward_half, dataflow_of, tangent_dependents

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten


@st.composite
def joint_graphs(draw: st.DrawFn) -> Graph:
    """Graphs of at most 4 placeholders and 10 operators, some of them dead; metadata is left out."""
    graph = Graph()
    nodes: list[Node] = []
    for index, kind in enumerate(draw(st.lists(st.sampled_from(["primals", "tangents"]), min_size=1, max_size=4))):
        nodes.append(graph.placeholder(f"{kind}_{index}"))
    for operands in draw(st.lists(st.lists(st.integers(0, 13), min_size=1, max_size=3), max_size=10)):
        nodes.append(graph.call_function(aten.add.Tensor, tuple(nodes[index % len(nodes)] for index in operands)))
    graph.output(tuple(draw(st.lists(st.sampled_from(nodes), max_size=4))))
    return graph


def depends_on_a_tangent(node: Node) -> bool:
    return node.name.startswith("tangents") or any(depends_on_a_tangent(source) for source in node.all_input_nodes)


def leads_to(node: Node, result: Node) -> bool:
    return node is result or any(leads_to(user, result) for user in node.users)


@given(joint_graphs())
def test_dataflow_has_an_edge_from_every_node_to_each_of_its_users(graph: Graph) -> None:
    dataflow = dataflow_of(graph)
    assert list(dataflow) == list(graph.nodes)
    assert set(dataflow.edges) == {(source, node) for node in graph.nodes for source in node.all_input_nodes}


@given(joint_graphs())
def test_tangent_dependents_have_a_path_from_a_tangent(graph: Graph) -> None:
    expected = {node for node in graph.nodes if depends_on_a_tangent(node)}
    assert tangent_dependents(dataflow_of(graph)) == expected


@given(joint_graphs())
def test_backward_half_depends_on_a_tangent_or_leads_to_no_forward_result(graph: Graph) -> None:
    forward_results = [node for node in graph.output_node().all_input_nodes if not depends_on_a_tangent(node)]
    expected = {
        node
        for node in graph.nodes
        if node.op != "output"
        and (
            depends_on_a_tangent(node)
            or (node.op == "call_function" and not any(leads_to(node, result) for result in forward_results))
        )
    }
    assert backward_half(dataflow_of(graph)) == expected


def test_a_derivative_depends_on_no_gradient_and_belongs_to_the_backward(joint: "Joint") -> None:
    x, tangent = joint.input("primals_1", torch.zeros(3)), joint.input("tangents_1", torch.zeros(3))
    sine = joint.call(aten.sin.default, x)
    cosine = joint.call(aten.cos.default, x)
    product = joint.call(aten.mul.Tensor, tangent, cosine)
    negated = joint.call(aten.neg.default, product)
    joint.output(sine, negated)
    dataflow = dataflow_of(joint.graph)
    assert tangent_dependents(dataflow) == {tangent, product, negated, joint.graph.output_node()}
    assert backward_half(dataflow) == {tangent, cosine, product, negated}
