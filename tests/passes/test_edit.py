import operator
from typing import TYPE_CHECKING

import pytest
import torch

from sylva_compile.passes.edit import apply_scales, call, materialize
from sylva_compile.passes.match_weight_gradient import Operand, Scale

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten


class TestCall:
    def test_inserts_at_the_insertion_point_with_its_value(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        last = joint.call(aten.neg.default, x)
        joint.output(last)
        with joint.graph.inserting_before(last):
            node = call(joint.graph, aten.permute.default, x, [1, 0])
        assert node < last
        assert node.meta["val"].shape == (4, 3)
        assert node.meta["val"].fake_mode is joint.mode

    def test_numbers_and_none_among_the_arguments(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        channels = joint.input("primals_2", torch.zeros(2, dtype=torch.int64))
        assert call(joint.graph, aten.index.Tensor, x, [None, channels]).meta["val"].shape == (3, 2)
        assert call(joint.graph, aten.mul.Tensor, x, 2.0).meta["val"].shape == (3, 4)

    def test_a_list_of_nodes_and_one_of_its_results(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        both = call(joint.graph, aten.cat.default, [x, x])
        assert both.meta["val"].shape == (6, 4)
        parts = call(joint.graph, aten.split.Tensor, both, 3)
        assert call(joint.graph, operator.getitem, parts, 1).meta["val"].shape == (3, 4)

    def test_carries_its_value_and_no_other_key(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        x.meta.update(eager_input_vals=((), {}), stack_trace="somewhere", recompute=1)
        assert call(joint.graph, aten.neg.default, x).meta.keys() == {"val"}

    def test_shares_the_checkpointed_region_of_the_node_it_is_like(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        x.meta.update(eager_input_vals=((), {}), recompute=1, ac_graph_id=7)
        node = call(joint.graph, aten.neg.default, x, like=x)
        assert node.meta.keys() == {"val", "recompute", "ac_graph_id"}
        assert (node.meta["recompute"], node.meta["ac_graph_id"]) == (1, 7)

    def test_needs_a_node(self, joint: "Joint") -> None:
        with pytest.raises(AssertionError, match="at least one node"):
            call(joint.graph, aten.neg.default, 1.0)


class TestMaterialize:
    def test_an_operand_as_it_is_costs_nothing(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        assert materialize(joint.graph, Operand(x)) is x
        assert len(joint.graph.nodes) == 1

    def test_a_transposed_operand_gets_its_transpose(self, joint: "Joint") -> None:
        x = joint.input("primals_1", torch.zeros(3, 4))
        node = materialize(joint.graph, Operand(x, transposed=True))
        assert (node.target, node.args) == (aten.permute.default, (x, [1, 0]))
        assert node.meta["val"].shape == (4, 3)


class TestApplyScales:
    def test_the_last_factor_is_applied_first(self, joint: "Joint") -> None:
        blocks = joint.input("primals_1", torch.zeros(1, 4, 4))
        factor = joint.input("primals_2", torch.tensor(3.0))
        scales = (Scale(aten.neg.default), Scale(aten.div.Tensor, factor), Scale(aten.mul.Tensor, 2.0))
        result = apply_scales(joint.graph, blocks, scales)
        assert joint.targets() == [aten.mul.Tensor, aten.div.Tensor, aten.neg.default]
        assert result.target is aten.neg.default

    def test_a_factor_of_zero_is_a_factor(self, joint: "Joint") -> None:
        blocks = joint.input("primals_1", torch.zeros(1, 4, 4))
        assert apply_scales(joint.graph, blocks, [Scale(aten.mul.Tensor, 0)]).args == (blocks, 0)

    def test_none_leaves_the_blocks(self, joint: "Joint") -> None:
        blocks = joint.input("primals_1", torch.zeros(1, 4, 4))
        assert apply_scales(joint.graph, blocks, ()) is blocks
