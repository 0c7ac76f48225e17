import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._functorch._aot_autograd.descriptors import (
    AOTInput,
    GradAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch.fx import Node

from sylva_compile.kernels.observe import observe, observing
from sylva_compile.passes.observe_weight_gradients import observe_weight_gradients_pass

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
OBSERVE = observe._opoverload

T, M, N = 5, 6, 7


class Seen(NamedTuple):
    weight: Tensor
    lhs: Tensor
    rhs: Tensor
    activation_is_lhs: bool
    offsets: Tensor | None = None


class Model:
    """The joint graph of layers `y = x · weightᵀ`, with placeholders and results described as AOTAutograd does."""

    def __init__(self, joint: "Joint") -> None:
        self.joint = joint
        self.results: list[Node | None] = []
        self.descs: list[Any] = []
        self.missed: list[tuple[Node, str]] = []

    def weight(self, *shape: int, desc: AOTInput | None = None) -> Node:
        serial = len(self.joint.values)
        return self.joint.input(f"primals_{serial}", torch.randn(*shape), desc or PlainAOTInput(serial))

    def use(self, dtype: torch.dtype = torch.float32, tokens: int = T) -> tuple[Node, Node]:
        """Add the operands of one use of a weight: output gradients `[T, M]` and inputs `[T, N]`."""
        serial = len(self.joint.values)
        generator = torch.Generator().manual_seed(serial)
        x = torch.randn(tokens, N, generator=generator).to(dtype)
        gy = torch.randn(tokens, M, generator=generator).to(dtype)
        right = self.joint.input(f"primals_{serial}", x, PlainAOTInput(serial))
        tangent = TangentAOTInput(PlainAOTOutput(serial))
        return self.joint.input(f"tangents_{serial}", gy, tangent), right

    def product(self, lhs: Node, rhs: Node) -> Node:
        return self.joint.call(aten.mm.default, self.joint.call(aten.t.default, lhs), rhs)

    def returns(self, weight: Node, gradient: Node | None) -> None:
        self.results.append(gradient)
        self.descs.append(GradAOTOutput(weight.meta["desc"]))

    def rewrite(self) -> int:
        if not any(node.op == "output" for node in self.joint.graph.nodes):
            self.joint.output(*self.results, descs=self.descs)
        return observe_weight_gradients_pass(
            self.joint.graph, missed=lambda node, reason: self.missed.append((node, reason))
        )

    def observed(self) -> tuple[list[Tensor], list[Seen]]:
        """Run the graph; return its results and the operands that it hands to the listener."""
        seen: list[Seen] = []
        with observing(lambda *shown: seen.append(Seen(*shown))):
            return self.joint.run(), seen


@pytest.fixture
def model(joint: "Joint") -> Model:
    return Model(joint)


def check_observed(model: Model, weight: Node, gradient: Node, *, products: int = 1) -> list[Seen]:
    """Check that the observed products add up to the former gradient, which is now zeros that take no memory."""
    model.returns(weight, gradient)
    model.joint.output(*model.results, descs=model.descs)
    [before] = model.joint.run()
    assert model.rewrite() == 1
    assert not model.missed
    assert not {aten.mm.default, aten.bmm.default} & set(model.joint.targets())
    assert model.joint.targets().count(OBSERVE) == products
    [after], seen = model.observed()
    assert len(seen) == products
    total = sum(shown.lhs.double().t() @ shown.rhs.double() for shown in seen)
    torch.testing.assert_close(total, before.double(), rtol=1e-5, atol=1e-5)
    value = model.joint.values[[node.meta.get("desc") for node in model.joint.graph.nodes].index(weight.meta["desc"])]
    assert all(shown.weight is value for shown in seen)
    assert (after.shape, after.dtype) == (value.shape, value.dtype)
    assert not after.any()
    assert after.untyped_storage().nbytes() == after.element_size()
    return seen


class TestExperts:
    """The stacked weights of experts, whose tokens are sorted by expert."""

    ENDS = torch.tensor([3, 3, 8], dtype=torch.int32)

    def check(self, model: Model, weight: Node, gradient: Node) -> Seen:
        model.returns(weight, gradient)
        model.joint.output(*model.results, descs=model.descs)
        [before] = model.joint.run()
        assert model.rewrite() == 1
        [after], [seen] = model.observed()
        assert (after.shape, after.any()) == (before.shape, False) and not any(after.stride())
        assert not {aten._grouped_mm.default, aten.bmm.default} & set(model.joint.targets())
        assert seen.offsets is not None
        start = 0
        for expert, end in enumerate(seen.offsets.tolist()):
            own = seen.lhs[start:end].float().t() @ seen.rhs[start:end].float()
            torch.testing.assert_close(own, before[expert].float(), rtol=1e-2, atol=1e-2)
            start = end
        return seen

    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_grouped_product(self, model: Model, joint: "Joint", transposed: bool) -> None:
        weight = model.weight(3, 16, 32) if transposed else model.weight(3, 32, 16)
        x = joint.input("primals_8", torch.randn(8, 16).bfloat16(), PlainAOTInput(8))
        offsets = joint.input("primals_9", self.ENDS, PlainAOTInput(9))
        gy = joint.input("tangents_8", torch.randn(8, 32).bfloat16(), TangentAOTInput(PlainAOTOutput(8)))
        if transposed:
            gradient = joint.call(aten._grouped_mm.default, joint.call(aten.t.default, x), gy, offsets)
        else:
            turned = joint.call(aten._grouped_mm.default, joint.call(aten.t.default, x), gy, offsets)
            gradient = joint.call(aten.transpose.int, turned, 1, 2)
        seen = self.check(model, weight, gradient)
        assert seen.activation_is_lhs == transposed
        assert torch.equal(seen.offsets, self.ENDS)

    def test_a_batched_product(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(3, N, M)
        x = joint.input("primals_8", torch.randn(3, T, N), PlainAOTInput(8))
        gy = joint.input("tangents_8", torch.randn(3, T, M), TangentAOTInput(PlainAOTOutput(8)))
        seen = self.check(model, weight, joint.call(aten.bmm.default, joint.call(aten.transpose.int, x, 1, 2), gy))
        assert seen.activation_is_lhs
        assert seen.offsets.tolist() == [T, 2 * T, 3 * T]

    def test_the_gradient_of_the_input_is_computed_alone(self, model: Model, joint: "Joint") -> None:
        import transformers.integrations.moe  # noqa: F401  its operators exist once it is imported

        weight = model.weight(3, 16, 8)
        x = joint.input("primals_8", torch.randn(8, 16), PlainAOTInput(8))
        offsets = joint.input("primals_9", self.ENDS, PlainAOTInput(9))
        gy = joint.input("tangents_8", torch.randn(8, 8), TangentAOTInput(PlainAOTOutput(8)))
        both = joint.call(torch.ops.transformers.grouped_mm_fallback_backward.default, x, weight, offsets, gy)
        gradients = [joint.call(operator.getitem, both, at) for at in (0, 1)]
        model.returns(weight, gradients[1])
        joint.forward.append(gradients[0])
        joint.output(*model.results, descs=model.descs)
        dense, wanted = joint.run()
        assert model.rewrite() == 1
        (zero, found), [seen] = model.observed()
        torch.testing.assert_close(found, wanted)
        assert not zero.any()
        assert torch.ops.transformers.grouped_mm_fallback_backward.default not in joint.targets()
        torch.testing.assert_close(seen.lhs[3:].t() @ seen.rhs[3:], dense[2])


class TestShows:
    def test_a_linear_layer(self, model: Model) -> None:
        weight = model.weight(M, N)
        gy, x = model.use()
        [seen] = check_observed(model, weight, model.product(gy, x))
        assert not seen.activation_is_lhs
        assert seen.lhs.shape == (T, M)
        assert seen.rhs.shape == (T, N)

    def test_a_weight_that_is_a_parameter_of_the_module(self, model: Model) -> None:
        weight = model.weight(M, N, desc=ParamAOTInput("layer.weight"))
        check_observed(model, weight, model.product(*model.use()))

    def test_a_weight_stored_transposed(self, model: Model) -> None:
        weight = model.weight(N, M)
        gy, x = model.use()
        [seen] = check_observed(model, weight, model.product(x, gy))
        assert seen.activation_is_lhs
        assert seen.lhs.shape == (T, N)

    @pytest.mark.parametrize("transposes", [1, 2])
    def test_through_transposes(self, model: Model, transposes: int) -> None:
        weight = model.weight(M, N)
        gy, x = model.use()
        gradient = model.product(x, gy) if transposes == 1 else model.product(gy, x)
        for _ in range(transposes):
            gradient = model.joint.call(aten.t.default, gradient)
        [seen] = check_observed(model, weight, gradient)
        assert not seen.activation_is_lhs

    def test_operands_that_lie_transposed(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        gy = joint.input("tangents_8", torch.randn(M, T))
        x = joint.input("primals_9", torch.randn(N, T))
        [seen] = check_observed(model, weight, joint.call(aten.mm.default, gy, joint.call(aten.t.default, x)))
        assert seen.lhs.shape == (T, M)
        assert seen.rhs.shape == (T, N)

    def test_one_token(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        gy, x = model.use(tokens=1)
        check_observed(model, weight, joint.call(aten.mul.Tensor, joint.call(aten.t.default, gy), x))

    def test_batch_of_one(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        gy, x = model.use()
        operands = [joint.call(aten.unsqueeze.default, node, 0) for node in (joint.call(aten.t.default, gy), x)]
        gradient = joint.call(aten.view.default, joint.call(aten.bmm.default, *operands), [M, N])
        check_observed(model, weight, gradient)

    def test_under_autocast_the_operands_as_they_were_multiplied(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        product = model.product(*model.use(torch.bfloat16))
        gradient = joint.call(torch.ops.prims.convert_element_type.default, product, torch.float32)
        model.returns(weight, gradient)
        assert model.rewrite() == 1
        [after], [seen] = model.observed()
        assert (seen.lhs.dtype, seen.rhs.dtype) == (torch.bfloat16, torch.bfloat16)
        assert after.dtype == torch.float32

    def test_each_use_of_a_weight_used_twice(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        total = joint.call(aten.add.Tensor, model.product(*model.use()), model.product(*model.use()))
        check_observed(model, weight, total, products=2)

    def test_each_weight_with_its_own_operands(self, model: Model) -> None:
        weights = [model.weight(M, N), model.weight(M, N)]
        uses = [model.use(), model.use()]
        for weight, use in zip(weights, uses, strict=True):
            model.returns(weight, model.product(*use))
        assert model.rewrite() == 2
        _, seen = model.observed()
        values = model.joint.values
        assert [shown.weight is value for shown, value in zip(seen, values[:2], strict=True)] == [True, True]
        # Each use appended its inputs, then its output gradients.
        assert torch.equal(seen[0].lhs, values[3])
        assert torch.equal(seen[1].lhs, values[5])


class TestFactors:
    """Factors of the gradient are applied to the output gradients, never to the layer's inputs."""

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize(
        ("target", "args", "factor"),
        [
            (aten.neg.default, (), -1.0),
            (aten.mul.Tensor, (3.0,), 3.0),
            (aten.div.Tensor, (4.0,), 0.25),
            (aten.mul.Scalar, (3,), 3.0),
        ],
    )
    def test_number(self, model: Model, transposed: bool, target: Any, args: tuple[Any, ...], factor: float) -> None:
        weight = model.weight(N, M) if transposed else model.weight(M, N)
        gy, x = model.use()
        product = model.product(x, gy) if transposed else model.product(gy, x)
        [seen] = check_observed(model, weight, model.joint.call(target, product, *args))
        inputs, gradients = (seen.lhs, seen.rhs) if transposed else (seen.rhs, seen.lhs)
        assert seen.activation_is_lhs == transposed
        assert torch.equal(inputs, model.joint.values[1])
        torch.testing.assert_close(gradients, factor * model.joint.values[2])

    def test_tensor_without_dimensions(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        gy, x = model.use()
        scale = joint.input("tangents_9", torch.tensor(0.5))
        [seen] = check_observed(model, weight, joint.call(aten.div.Tensor, model.product(gy, x), scale))
        torch.testing.assert_close(seen.lhs, 2 * joint.values[2])

    def test_second_side_of_a_difference(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        first, second = model.product(*model.use()), model.product(*model.use())
        gradient = joint.call(aten.mul.Tensor, joint.call(aten.sub.Tensor, first, second), 3.0)
        seen = check_observed(model, weight, gradient, products=2)
        torch.testing.assert_close(seen[1].lhs, -3 * joint.values[4])


class TestRefuses:
    def check_untouched(self, model: Model, weight: Node) -> None:
        """Check that the graph stays as it is and that the pass reports a reason for `weight`."""
        model.joint.output(*model.results, descs=model.descs)
        code = str(model.joint.graph)
        assert model.rewrite() == 0
        assert str(model.joint.graph) == code
        assert [node for node, _ in model.missed] == [weight]

    def test_other_operator_untouched(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        model.returns(weight, joint.call(aten.relu.default, model.product(*model.use())))
        self.check_untouched(model, weight)
        assert "relu" in model.missed[0][1]

    def test_sum_with_an_opaque_side_untouched(self, model: Model, joint: "Joint") -> None:
        # Half of a gradient would be worse than none: the weight's curvature would be of one use only.
        weight = model.weight(M, N)
        relu = joint.call(aten.relu.default, model.product(*model.use()))
        model.returns(weight, joint.call(aten.add.Tensor, model.product(*model.use()), relu))
        self.check_untouched(model, weight)

    def test_dense_gradient_read_elsewhere_untouched(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        product = model.product(*model.use())
        model.returns(weight, product)
        model.results.append(joint.call(aten.sum.default, product))
        model.descs.append(PlainAOTOutput(0))
        self.check_untouched(model, weight)
        assert "used elsewhere" in model.missed[0][1]

    def test_gradient_from_outside_untouched(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        model.returns(weight, joint.input("tangents_9", torch.zeros(M, N)))
        self.check_untouched(model, weight)

    def test_parameter_that_is_no_matrix_untouched(self, model: Model, joint: "Joint") -> None:
        bias = model.weight(M)
        gy, _ = model.use()
        model.returns(bias, joint.call(aten.sum.dim_IntList, gy, [0]))
        joint.output(*model.results, descs=model.descs)
        code = str(joint.graph)
        assert model.rewrite() == 0
        assert str(joint.graph) == code
        assert not model.missed

    def test_result_that_is_no_gradient_untouched(self, model: Model, joint: "Joint") -> None:
        model.results.append(model.product(*model.use()))
        model.descs.append(PlainAOTOutput(0))
        assert model.rewrite() == 0
        assert OBSERVE not in joint.targets()

    def test_weight_without_a_gradient_untouched(self, model: Model, joint: "Joint") -> None:
        model.returns(model.weight(M, N), None)
        assert model.rewrite() == 0
        assert not model.missed

    def test_an_activation_from_another_graph_untouched(self, model: Model, joint: "Joint") -> None:
        activation = model.weight(M, N)
        model.returns(activation, model.product(*model.use()))
        joint.output(*model.results, descs=model.descs)
        code = str(joint.graph)
        assert observe_weight_gradients_pass(joint.graph, is_weight=lambda node: node is not activation) == 0
        assert str(joint.graph) == code

    def test_one_weight_missed_does_not_spoil_the_other(self, model: Model, joint: "Joint") -> None:
        good, bad = model.weight(M, N), model.weight(M, N)
        model.returns(bad, joint.call(aten.relu.default, model.product(*model.use())))
        model.returns(good, model.product(*model.use()))
        joint.output(*model.results, descs=model.descs)
        before = joint.run()
        assert model.rewrite() == 1
        assert [node for node, _ in model.missed] == [bad]
        (dense, zero), [seen] = model.observed()
        assert torch.equal(dense, before[0])
        assert not zero.any()
        assert seen.weight is joint.values[0]

    def test_without_a_listener_for_what_is_missed(self, model: Model, joint: "Joint") -> None:
        model.returns(model.weight(M, N), joint.call(aten.relu.default, model.product(*model.use())))
        joint.output(*model.results, descs=model.descs)
        assert observe_weight_gradients_pass(joint.graph) == 0


class TestGraphAfterwards:
    def test_a_second_run_changes_nothing(self, model: Model, joint: "Joint") -> None:
        model.returns(model.weight(M, N), model.product(*model.use()))
        model.rewrite()
        code = str(joint.graph)
        assert model.rewrite() == 0
        assert str(joint.graph) == code

    def test_new_nodes_carry_their_value_and_no_other_key(self, model: Model, joint: "Joint") -> None:
        total = joint.call(aten.sub.Tensor, model.product(*model.use()), model.product(*model.use()))
        model.returns(model.weight(M, N), total)
        for node in joint.graph.nodes:
            node.meta["eager_input_vals"] = "of the old node"
        old = set(joint.graph.nodes)
        model.rewrite()
        new = [node for node in joint.graph.nodes if node not in old and node.op == "call_function"]
        assert {OBSERVE, aten.add.Tensor, aten.neg.default, aten.expand.default} == {node.target for node in new}
        assert all(node.meta.keys() == {"val"} for node in new)

    def test_other_results_keep_their_places_and_descriptions(self, model: Model, joint: "Joint") -> None:
        weight = model.weight(M, N)
        gy, x = model.use()
        model.results.append(joint.call(aten.neg.default, x))
        model.descs.append(PlainAOTOutput(0))
        model.returns(weight, model.product(gy, x))
        model.returns(weight, None)
        model.rewrite()
        output = joint.graph.output_node()
        assert isinstance(output.args[0], tuple)
        assert [getattr(result, "target", None) for result in output.args[0]] == [
            aten.neg.default,
            aten.expand.default,
            None,
        ]
        assert output.meta["desc"] == model.descs
