"""The pass that tags quantised weights: which nodes it tags, and which it leaves alone."""

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

from sylva_compile._torch import operator_of
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.passes.edit import call
from sylva_compile.passes.recompute_weights import recompute_weights_pass

aten = torch.ops.aten
GATHER = operator_of(gather_blocks)


def graph_of(*, trained: bool = True) -> Graph:
    """Return the joint graph of `x @ Wᵀ`, where W has blocks of 2 written into a sum of packed and scales."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph, mode = Graph(), FakeTensorMode()

    def given(name: str, value: Tensor) -> torch.fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(value)
        return node

    packed, scales, x = (
        given("packed", torch.zeros(4, 4)),
        given("scales", torch.zeros(4, 1)),
        given("x", torch.zeros(3, 4)),
    )
    blocks, positions = given("blocks", torch.zeros(1, 2, 2)), given("positions", torch.zeros(2, 1, dtype=torch.int64))
    gy = given("tangents_1", torch.zeros(3, 4))
    dense = call(graph, aten.mul.Tensor, packed, scales)
    row = call(graph, aten.select.int, positions, 0, 0)
    index = call(graph, aten.expand.default, row, [2])
    rows = call(graph, aten.view.default, dense, [8, 2])
    values = call(graph, aten.view.default, blocks, [2, 2])
    write = call(graph, aten.index_put.default, rows, [index], values)
    weight = call(graph, aten.view.default, write, [4, 4])
    turned = call(graph, aten.t.default, weight)
    out = call(graph, aten.mm.default, x, turned)
    outputs = [out, call(graph, aten.mm.default, gy, weight)]
    if trained:
        gradient = call(graph, aten.mm.default, call(graph, aten.t.default, gy), x)
        outputs.append(call(graph, GATHER, gradient, positions, row, positions, 2, 1))
    graph.output(tuple(outputs))
    return graph


def tagged(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE]


MADE = ["aten.mul.Tensor", "aten.select.int", "aten.expand.default", "aten.view.default", "aten.view.default"]
WRITTEN = [*MADE, "aten.index_put.default", "aten.view.default", "aten.t.default"]


def test_tags_all_from_the_dequantisation_to_the_views() -> None:
    graph = graph_of()
    assert recompute_weights_pass(graph) == 1
    assert tagged(graph) == WRITTEN
    assert not any("ac_graph_id" in node.meta for node in graph.nodes)


def test_a_second_run_changes_nothing() -> None:
    graph = graph_of()
    recompute_weights_pass(graph)
    assert recompute_weights_pass(graph) == 0


def test_finds_frozen_blocks_by_their_positions() -> None:
    graph = graph_of(trained=False)
    assert recompute_weights_pass(graph) == 0
    assert recompute_weights_pass(graph, is_positions=lambda node: node.target == "positions") == 1
    assert tagged(graph) == WRITTEN


def test_leaves_other_writes_untouched() -> None:
    graph = graph_of()
    [gather] = graph.find_nodes(op="call_function", target=GATHER)
    [other] = [node for node in graph.nodes if node.target == "blocks"]
    gather.update_arg(1, other)
    assert recompute_weights_pass(graph) == 0
    assert not tagged(graph)
