"""The pass that observes gradients of frozen weights, on hand-built graphs."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput, PlainAOTOutput, TangentAOTInput
from torch.fx import Node

from sylva_compile.kernels.observe import observe, observing
from sylva_compile.kernels.probe import probe
from sylva_compile.passes.observe_probes import observe_probes_pass

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
OBSERVE, PROBE = observe._opoverload, probe._opoverload

T, M, N = 5, 6, 7


class Model:
    """A joint graph in which a product becomes the gradient of a probe."""

    def __init__(self, joint: "Joint") -> None:
        self.joint = joint
        self.leaf_value, self.x_value, self.gy_value = torch.zeros(()), torch.randn(T, N), torch.randn(T, M)
        self.leaf = joint.input("primals_0", self.leaf_value, PlainAOTInput(0))
        self.x = joint.input("primals_1", self.x_value, PlainAOTInput(1))
        self.gy = joint.input("tangents_0", self.gy_value, TangentAOTInput(PlainAOTOutput(0)))
        self.missed: list[tuple[Node, str]] = []

    def product(self) -> Node:
        return self.joint.call(aten.mm.default, self.joint.call(aten.t.default, self.gy), self.x)

    def probed(self, gradient: Node) -> None:
        self.joint.output(self.joint.call(PROBE, gradient, self.leaf), descs=[GradAOTOutput(self.leaf.meta["desc"])])

    def rewrite(self) -> int:
        return observe_probes_pass(self.joint.graph, missed=lambda *given: self.missed.append(given))

    def run(self) -> tuple[float, list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None]]]:
        seen: list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None]] = []
        with observing(lambda *shown: seen.append(shown)):
            (zero,) = self.joint.run()
        return float(zero), seen


def test_the_listener_gets_the_probe_and_the_operands(joint: "Joint") -> None:
    model = Model(joint)
    model.probed(model.product())
    assert model.rewrite() == 1
    assert not joint.graph.find_nodes(op="call_function", target=aten.mm.default)
    zero, [(leaf, lhs, rhs, activation_is_lhs, _)] = model.run()
    assert (zero, activation_is_lhs) == (0.0, False)
    assert leaf.data_ptr() == model.leaf_value.data_ptr()
    assert torch.equal(lhs, model.gy_value) and torch.equal(rhs, model.x_value)


def test_a_second_run_changes_nothing(joint: "Joint") -> None:
    model = Model(joint)
    model.probed(model.product())
    model.rewrite()
    before = str(joint.graph)
    assert model.rewrite() == 0
    assert str(joint.graph) == before


def test_a_sum_of_products_is_observed_term_by_term(joint: "Joint") -> None:
    model = Model(joint)
    model.probed(joint.call(aten.add.Tensor, model.product(), joint.call(aten.mul.Tensor, model.product(), 3.0)))
    assert model.rewrite() == 1
    _, seen = model.run()
    total = sum(lhs.t() @ rhs for _, lhs, rhs, *_ in seen)
    torch.testing.assert_close(total, 4 * model.gy_value.t() @ model.x_value)


def test_an_opaque_gradient_stays_and_is_told(joint: "Joint") -> None:
    model = Model(joint)
    model.probed(joint.call(aten.relu.default, model.product()))
    before = str(joint.graph)
    assert model.rewrite() == 0
    assert str(joint.graph) == before
    [(leaf, reason)] = model.missed
    assert leaf is model.leaf and "relu" in reason
    assert model.run() == (1.0, [])
