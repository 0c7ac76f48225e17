from typing import TYPE_CHECKING

import pytest
import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from sylva_compile._torch import operator_of
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm
from sylva_compile.passes.recompute_gathers import recompute_gathers

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
GROUPED = operator_of(grouped_sddmm)


class Layer:
    """Rows gathered for two experts, and the sampled product that reads them."""

    def __init__(self, joint: "Joint", *, indices: int = 1) -> None:
        self.hidden = joint.input("primals_1", torch.zeros(4, 16))
        order = joint.input("primals_2", torch.zeros(8, dtype=torch.int64))
        positions = joint.input("primals_3", torch.zeros(2, 1, dtype=torch.int64))
        offsets = joint.input("primals_4", torch.tensor([3, 8], dtype=torch.int32))
        self.gy = joint.input("tangents_1", torch.zeros(8, 16))
        self.rows = joint.call(aten.index.Tensor, self.hidden, [order])
        joint.forward.append(joint.call(aten.relu.default, self.rows))
        self.product = joint.call(GROUPED, self.gy, self.rows, positions, offsets, 8)

    def mark(self, joint: "Joint", *results: Node) -> int:
        joint.output(self.product, *results)
        return recompute_gathers(joint.graph, [self.product], [self.rows])


def test_a_gather_is_marked_once(joint: "Joint") -> None:
    layer = Layer(joint)
    assert layer.mark(joint) == 1
    assert layer.rows.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE
    assert recompute_gathers(joint.graph, [layer.product], [layer.rows]) == 0


def test_a_gather_that_the_backward_reads_otherwise_is_untouched(joint: "Joint") -> None:
    layer = Layer(joint)
    assert layer.mark(joint, joint.call(aten.mul.Tensor, layer.gy, layer.rows)) == 0
    assert "recompute" not in layer.rows.meta


def test_a_gather_inside_of_a_checkpoint_is_untouched(joint: "Joint") -> None:
    layer = Layer(joint)
    layer.rows.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    assert layer.mark(joint) == 0
    assert layer.rows.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["no gather", "a gather of gradients"])
def test_other_activations_are_untouched(joint: "Joint", kind: str) -> None:
    layer = Layer(joint)
    source = layer.hidden if kind == "no gather" else joint.call(aten.index.Tensor, layer.gy, layer.rows.args[1])
    joint.output(layer.product, source if kind != "no gather" else None)
    assert recompute_gathers(joint.graph, [layer.product], [source]) == 0
