import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch.fx import Node

from sylva_compile.passes.match_weight_gradient import Operand, Scale, Term, is_transpose, match_weight_gradient

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten

T, M, N = 5, 6, 7


class Layer:
    """The operands of `gyᵀ · x`, laid out as in a linear layer, and their product."""

    def __init__(self, joint: "Joint", suffix: str = "1") -> None:
        self.joint = joint
        self.x = joint.input(f"primals_{suffix}", torch.zeros(T, N))
        self.gy = joint.input(f"tangents_{suffix}", torch.zeros(T, M))

    def product(self) -> Node:
        return self.joint.call(aten.mm.default, self.joint.call(aten.t.default, self.gy), self.x)

    def turned(self) -> Node:
        """Add `xᵀ · gy`, the transpose of the gradient."""
        return self.joint.call(aten.mm.default, self.joint.call(aten.t.default, self.x), self.gy)

    def term(self, *scales: Scale) -> Term:
        return Term(Operand(self.gy), Operand(self.x), scales)


@pytest.fixture
def layer(joint: "Joint") -> Layer:
    return Layer(joint)


class TestProduct:
    def test_of_a_linear_layer_has_token_major_operands(self, layer: Layer) -> None:
        assert match_weight_gradient(layer.product()) == [layer.term()]

    def test_of_a_weight_stored_transposed_has_the_activation_first(self, layer: Layer) -> None:
        assert match_weight_gradient(layer.turned()) == [Term(Operand(layer.x), Operand(layer.gy))]

    def test_of_an_operand_without_a_transpose_node_keeps_the_transpose_that_is_needed(self, joint: "Joint") -> None:
        left = joint.input("tangents_1", torch.zeros(M, T))
        right = joint.input("primals_1", torch.zeros(T, N))
        product = joint.call(aten.mm.default, left, right)
        assert match_weight_gradient(product) == [Term(Operand(left, transposed=True), Operand(right))]

    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_operands_are_seen_through_their_own_transposes(self, layer: Layer, turns: int) -> None:
        joint = layer.joint
        left, right = joint.call(aten.t.default, layer.gy), layer.x
        for _ in range(turns):
            right = joint.call(aten.permute.default, right, [1, 0])
        if turns % 2:
            right = joint.call(aten.t.default, right)
        assert match_weight_gradient(joint.call(aten.mm.default, left, right)) == [layer.term()]

    def test_outer_product_of_one_token(self, joint: "Joint") -> None:
        left = joint.input("tangents_1", torch.zeros(M, 1))
        right = joint.input("primals_1", torch.zeros(1, N))
        product = joint.call(aten.mul.Tensor, left, right)
        assert match_weight_gradient(product) == [Term(Operand(left, transposed=True), Operand(right))]

    def test_batch_of_one(self, layer: Layer) -> None:
        joint = layer.joint
        left = joint.call(aten.unsqueeze.default, joint.call(aten.t.default, layer.gy), 0)
        right = joint.call(aten.unsqueeze.default, layer.x, 0)
        product = joint.call(aten.view.default, joint.call(aten.bmm.default, left, right), [M, N])
        assert match_weight_gradient(product) == [layer.term()]


class TestTransposes:
    @pytest.mark.parametrize(
        ("target", "args"),
        [
            (aten.t.default, ()),
            (aten.permute.default, ([1, 0],)),
            (aten.permute.default, ([-1, -2],)),
            (aten.transpose.int, (0, 1)),
            (aten.transpose.int, (-1, 0)),
        ],
    )
    def test_one_swaps_the_operands(self, layer: Layer, target: torch._ops.OpOverload, args: tuple[object]) -> None:
        gradient = layer.joint.call(target, layer.turned(), *args)
        assert is_transpose(gradient)
        assert match_weight_gradient(gradient) == [layer.term()]

    @pytest.mark.parametrize(
        ("target", "args"), [(aten.permute.default, ([0, 1],)), (aten.transpose.int, (1, -1)), (aten.neg.default, ())]
    )
    def test_identity_and_others_are_none(
        self, layer: Layer, target: torch._ops.OpOverload, args: tuple[object]
    ) -> None:
        assert not is_transpose(layer.joint.call(target, layer.product(), *args))

    def test_of_more_dimensions_are_none(self, joint: "Joint") -> None:
        cube = joint.input("primals_1", torch.zeros(2, 3, 4))
        assert not is_transpose(joint.call(aten.permute.default, cube, [1, 0, 2]))
        assert not is_transpose(joint.call(aten.transpose.int, cube, 0, 1))
        assert not is_transpose(cube)

    def test_two_cancel(self, layer: Layer) -> None:
        once = layer.joint.call(aten.t.default, layer.product())
        assert match_weight_gradient(layer.joint.call(aten.t.default, once)) == [layer.term()]


class TestLinearOperators:
    def test_casts_vanish(self, layer: Layer) -> None:
        joint = layer.joint
        cast = joint.call(aten._to_copy.default, layer.product(), dtype=torch.bfloat16)
        cast = joint.call(torch.ops.prims.convert_element_type.default, cast, torch.float32)
        assert match_weight_gradient(cast) == [layer.term()]

    @pytest.mark.parametrize("target", [aten.view.default, aten.reshape.default, aten._unsafe_view.default])
    def test_views_of_the_same_shape_vanish(self, layer: Layer, target: torch._ops.OpOverload) -> None:
        assert match_weight_gradient(layer.joint.call(target, layer.product(), [M, N])) == [layer.term()]

    @pytest.mark.parametrize("target", [aten.clone.default, aten.alias.default, aten.detach.default])
    def test_copies_vanish(self, layer: Layer, target: torch._ops.OpOverload) -> None:
        assert match_weight_gradient(layer.joint.call(target, layer.product())) == [layer.term()]

    def test_sum_has_a_term_for_each_side(self, layer: Layer) -> None:
        other = Layer(layer.joint, "2")
        turned = layer.joint.call(aten.t.default, other.turned())
        total = layer.joint.call(aten.add.Tensor, layer.product(), turned)
        assert match_weight_gradient(total) == [layer.term(), other.term()]

    def test_sum_of_three_is_flat(self, layer: Layer) -> None:
        second, third = Layer(layer.joint, "2"), Layer(layer.joint, "3")
        inner = layer.joint.call(aten.add.Tensor, layer.product(), second.product())
        total = layer.joint.call(aten.add.Tensor, inner, third.product())
        assert match_weight_gradient(total) == [layer.term(), second.term(), third.term()]

    def test_chain_of_more_sums_than_the_interpreter_recurses(self, layer: Layer) -> None:
        total = layer.product()
        for _ in range(sys.getrecursionlimit()):
            total = layer.joint.call(aten.add.Tensor, total, layer.product())
        assert match_weight_gradient(total) == [layer.term()] * (1 + sys.getrecursionlimit())

    def test_difference_negates_the_second_side(self, layer: Layer) -> None:
        other = Layer(layer.joint, "2")
        total = layer.joint.call(aten.sub.Tensor, layer.product(), other.product())
        assert match_weight_gradient(total) == [layer.term(), other.term(Scale(aten.neg.default))]

    def test_negation(self, layer: Layer) -> None:
        gradient = layer.joint.call(aten.neg.default, layer.product())
        assert match_weight_gradient(gradient) == [layer.term(Scale(aten.neg.default))]

    @pytest.mark.parametrize("target", [aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar])
    def test_number_as_factor(self, layer: Layer, target: torch._ops.OpOverload) -> None:
        gradient = layer.joint.call(target, layer.product(), 3.0)
        assert match_weight_gradient(gradient) == [layer.term(Scale(target, 3.0))]

    @pytest.mark.parametrize("target", [aten.mul.Tensor, aten.div.Tensor])
    def test_tensor_without_dimensions_as_factor(self, layer: Layer, target: torch._ops.OpOverload) -> None:
        factor = layer.joint.input("primals_2", torch.tensor(3.0))
        gradient = layer.joint.call(target, layer.product(), factor)
        assert match_weight_gradient(gradient) == [layer.term(Scale(target, factor))]

    def test_factors_are_listed_from_the_outside_in(self, layer: Layer) -> None:
        inner = layer.joint.call(aten.div.Tensor, layer.product(), 2.0)
        outer = layer.joint.call(aten.neg.default, inner)
        scales = (Scale(aten.neg.default), Scale(aten.div.Tensor, 2.0))
        assert match_weight_gradient(outer) == [layer.term(*scales)]

    def test_a_factor_of_a_sum_belongs_to_every_term(self, layer: Layer) -> None:
        other = Layer(layer.joint, "2")
        total = layer.joint.call(aten.sub.Tensor, layer.product(), other.product())
        gradient = layer.joint.call(aten.mul.Tensor, total, 3.0)
        triple = Scale(aten.mul.Tensor, 3.0)
        assert match_weight_gradient(gradient) == [layer.term(triple), other.term(triple, Scale(aten.neg.default))]


class TestOpaque:
    """Gradients that stay dense, with a reason for the user."""

    def opaque(self, gradient: Node) -> Term:
        [term] = match_weight_gradient(gradient)
        assert term.rhs is None
        assert term.reason is not None
        return term

    @pytest.mark.parametrize("target", [aten.relu.default, aten.sin.default, aten.abs.default])
    def test_other_operator_untouched(self, layer: Layer, target: torch._ops.OpOverload) -> None:
        gradient = layer.joint.call(target, layer.product())
        term = self.opaque(gradient)
        assert term.lhs == Operand(gradient)
        assert str(target) in str(term.reason)

    def test_other_operator_below_a_transpose_untouched(self, layer: Layer) -> None:
        relu = layer.joint.call(aten.relu.default, layer.turned())
        term = self.opaque(layer.joint.call(aten.t.default, relu))
        assert term.lhs == Operand(relu, transposed=True)

    def test_factors_above_another_operator_stay_with_it(self, layer: Layer) -> None:
        relu = layer.joint.call(aten.relu.default, layer.product())
        term = self.opaque(layer.joint.call(aten.neg.default, relu))
        assert term.scales == (Scale(aten.neg.default),)

    def test_placeholder_untouched(self, joint: "Joint") -> None:
        gradient = joint.input("tangents_1", torch.zeros(M, N))
        assert "outside the graph" in str(self.opaque(gradient).reason)

    @pytest.mark.parametrize("where", ["product", "cast"])
    def test_dense_gradient_read_elsewhere_untouched(self, layer: Layer, where: str) -> None:
        joint = layer.joint
        product = layer.product()
        cast = joint.call(aten._to_copy.default, product, dtype=torch.float64)
        joint.call(aten.sum.default, product if where == "product" else cast)
        joint.output(cast)
        assert "used elsewhere" in str(self.opaque(cast).reason)

    def test_tensor_factor_with_dimensions_untouched(self, layer: Layer) -> None:
        factor = layer.joint.input("primals_2", torch.zeros(N))
        self.opaque(layer.joint.call(aten.mul.Tensor, layer.product(), factor))

    def test_elementwise_product_of_matrices_untouched(self, layer: Layer) -> None:
        factor = layer.joint.input("primals_2", torch.zeros(M, N))
        self.opaque(layer.joint.call(aten.mul.Tensor, layer.product(), factor))

    def test_a_row_times_a_column_of_other_shapes_untouched(self, joint: "Joint") -> None:
        # [m, 1] * [m, n] broadcasts; it is no product over a token.
        column = joint.input("tangents_1", torch.zeros(M, 1))
        matrix = joint.input("primals_1", torch.zeros(M, N))
        self.opaque(joint.call(aten.mul.Tensor, column, matrix))

    def test_sum_with_a_multiple_untouched(self, layer: Layer) -> None:
        other = Layer(layer.joint, "2")
        self.opaque(layer.joint.call(aten.add.Tensor, layer.product(), other.product(), alpha=2))

    def test_sum_that_broadcasts_untouched(self, layer: Layer) -> None:
        row = layer.joint.input("primals_2", torch.zeros(1, N))
        self.opaque(layer.joint.call(aten.add.Tensor, layer.product(), row))
        self.opaque(layer.joint.call(aten.add.Tensor, layer.product(), 1.0))

    def test_view_of_another_shape_untouched(self, layer: Layer) -> None:
        self.opaque(layer.joint.call(aten.view.default, layer.product(), [N, M]))

    def test_batch_of_two_untouched(self, joint: "Joint") -> None:
        left, right = joint.input("tangents_1", torch.zeros(2, 3, T)), joint.input("primals_1", torch.zeros(2, T, N))
        product = joint.call(aten.bmm.default, left, right)
        self.opaque(joint.call(aten.view.default, product, [6, N]))

    def test_batch_of_one_read_elsewhere_untouched(self, layer: Layer) -> None:
        joint = layer.joint
        left = joint.call(aten.unsqueeze.default, joint.call(aten.t.default, layer.gy), 0)
        product = joint.call(aten.bmm.default, left, joint.call(aten.unsqueeze.default, layer.x, 0))
        joint.call(aten.sum.default, product)
        self.opaque(joint.call(aten.view.default, product, [M, N]))

    def test_batch_of_one_viewed_in_another_shape_untouched(self, layer: Layer) -> None:
        joint = layer.joint
        left = joint.call(aten.unsqueeze.default, joint.call(aten.t.default, layer.gy), 0)
        product = joint.call(aten.bmm.default, left, joint.call(aten.unsqueeze.default, layer.x, 0))
        self.opaque(joint.call(aten.view.default, product, [N, M]))

    def test_only_the_opaque_side_of_a_sum_is_opaque(self, layer: Layer) -> None:
        other = Layer(layer.joint, "2")
        relu = layer.joint.call(aten.relu.default, other.product())
        first, second = match_weight_gradient(layer.joint.call(aten.add.Tensor, layer.product(), relu))
        assert first == layer.term()
        assert (second.lhs, second.rhs) == (Operand(relu), None)


class TestExperts:
    """Products of stacked experts carry the offsets of their tokens."""

    @pytest.fixture
    def sides(self, joint: "Joint") -> dict[str, Node]:
        return {
            "x": joint.input("primals_1", torch.zeros(8, 16, dtype=torch.bfloat16)),
            "gy": joint.input("tangents_1", torch.zeros(8, 32, dtype=torch.bfloat16)),
            "offsets": joint.input("primals_2", torch.tensor([3, 8], dtype=torch.int32)),
        }

    def test_grouped_mm_of_a_stored_weight(self, joint: "Joint", sides: dict[str, Node]) -> None:
        left = joint.call(aten.transpose.int, sides["gy"], -2, -1)
        product = joint.call(aten._grouped_mm.default, left, sides["x"], sides["offsets"])
        (term,) = match_weight_gradient(product)
        assert term == Term(Operand(sides["gy"]), Operand(sides["x"]), offsets=sides["offsets"])

    @pytest.mark.parametrize("how", ["transpose", "permute"])
    def test_a_transpose_of_each_expert_swaps_the_operands(
        self, joint: "Joint", sides: dict[str, Node], how: str
    ) -> None:
        left = joint.call(aten.t.default, sides["x"])
        product = joint.call(aten._grouped_mm.default, left, sides["gy"], sides["offsets"])
        args = (aten.transpose.int, -2, -1) if how == "transpose" else (aten.permute.default, [0, 2, 1])
        (term,) = match_weight_gradient(joint.call(args[0], product, *args[1:]))
        assert term == Term(Operand(sides["gy"]), Operand(sides["x"]), offsets=sides["offsets"])

    def test_the_product_of_a_forward_pass_stays_dense(self, joint: "Joint", sides: dict[str, Node]) -> None:
        weight = joint.input("primals_3", torch.zeros(2, 16, 32, dtype=torch.bfloat16))
        product = joint.call(aten._grouped_mm.default, sides["x"], weight, sides["offsets"])
        (term,) = match_weight_gradient(product)
        assert term.rhs is None and "_grouped_mm" in (term.reason or "")

    def test_a_batched_product(self, joint: "Joint") -> None:
        x, gy = joint.input("primals_1", torch.zeros(2, 5, 16)), joint.input("tangents_1", torch.zeros(2, 5, 32))
        product = joint.call(aten.bmm.default, joint.call(aten.transpose.int, x, 1, 2), gy)
        assert match_weight_gradient(product) == [Term(Operand(x), Operand(gy), batched=True)]

    def test_a_transpose_of_the_experts_themselves_stays_dense(self, joint: "Joint") -> None:
        x, gy = joint.input("primals_1", torch.zeros(2, 5, 16)), joint.input("tangents_1", torch.zeros(2, 5, 32))
        product = joint.call(aten.bmm.default, joint.call(aten.transpose.int, x, 1, 2), gy)
        (term,) = match_weight_gradient(joint.call(aten.transpose.int, product, 0, 1))
        assert term.rhs is None
