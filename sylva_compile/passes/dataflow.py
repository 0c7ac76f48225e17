"""Reachability in a joint graph: which nodes depend on a gradient, and which nodes only the backward pass needs.

AOTAutograd traces forward and backward into one `torch.fx.Graph`; a partitioner cuts it in two after the passes have
run. So passes find the two halves by the dataflow: gradients from outside enter through the placeholders `tangents_…`,
and the output node lists the results of the forward pass beside the gradients.
"""

from collections.abc import Iterable
from itertools import chain

import networkx as nx
from torch.fx import Graph, Node


def dataflow_of(graph: Graph) -> nx.DiGraph:
    """Return `graph` as a directed graph with an edge from every node to each of its users."""
    return nx.from_dict_of_lists({node: node.users for node in graph.nodes}, create_using=nx.DiGraph)


def tangent_dependents(dataflow: nx.DiGraph) -> set[Node]:
    """Return the placeholders of gradients from outside, and every node that depends on one of them."""
    tangents = [node for node in dataflow if node.op == "placeholder" and "tangents" in str(node.target)]
    return _reachable(dataflow, tangents)


def backward_half(dataflow: nx.DiGraph) -> set[Node]:
    """Return the nodes that only the backward pass needs.

    They are the nodes that depend on a gradient from outside, and the operators that no result of the forward pass
    depends on. The derivative of an activation function is of the second kind: it depends on no gradient.
    """
    [output] = (node for node in dataflow if node.op == "output")
    gradients = tangent_dependents(dataflow) - {output}
    forward_results = [node for node in dataflow.predecessors(output) if node not in gradients]
    forward = _reachable(dataflow.reverse(copy=False), forward_results)
    return gradients | {node for node in dataflow if node.op == "call_function" and node not in forward}


def _reachable(dataflow: nx.DiGraph, sources: Iterable[Node]) -> set[Node]:
    """Return `sources` and their descendants, in one search for all sources."""
    return set(chain.from_iterable(nx.bfs_layers(dataflow, sources)))
