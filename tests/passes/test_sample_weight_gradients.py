from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sylva_compile.kernels.blocks import read_blocks
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes.sample_weight_gradients import RewriteResult, sample_weight_gradients_pass

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
cast = torch.ops.prims.convert_element_type.default
GATHER = gather_blocks._opoverload
SDDMM = sddmm._opoverload
SHARED = sddmm_shared._opoverload
INDEX = aten.index.Tensor

# A weight [10, 14] in blocks of 4: no size is a multiple, and neither axis needs all of its channels.
T, M, N, B = 5, 10, 14, 4
POSITIONS = torch.tensor([[0, 0, 2], [1, 3, 0]])


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return integers from -2 to 2: sums of their products are exact in every dtype, so tests compare bit for bit."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def channels_of(positions: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the elements of the input axis that blocks cover, and the blocks' positions among these elements."""
    used = sorted(set(positions[axis].tolist()))
    channels = [channel for channel in range((M, N)[axis]) if channel // B in used]
    narrow = positions.clone()
    narrow[axis] = torch.tensor([used.index(position) for position in positions[axis].tolist()])
    return torch.tensor(channels), narrow


class MaskedWeight:
    """A weight `[M, N]` of one linear layer, its layout, and a way to mark its gradient."""

    def __init__(self, joint: "Joint", *, axis: int = 1, positions: Tensor = POSITIONS) -> None:
        self.joint, self.axis = joint, axis
        channels, narrow = channels_of(positions, axis)
        serial = len(joint.values)
        self.positions = joint.input(f"primals_positions_{serial}", positions)
        self.channels = joint.input(f"primals_channels_{serial}", channels)
        self.narrow = joint.input(f"primals_narrow_{serial}", narrow)
        self.dense: list[Tensor] = []

    def use(self, dtype: torch.dtype = torch.float32, tokens: int = T) -> tuple[Node, Node]:
        """Add the operands `[T, M]` and `[T, N]` of one use's gradient; operand `axis` is the layer's input."""
        serial = len(self.joint.values)
        values = [integers(tokens, size, seed=100 * serial + size, dtype=dtype) for size in (M, N)]
        names = [f"primals_x{serial}" if axis == self.axis else f"tangents_{serial}" for axis in (0, 1)]
        nodes = [self.joint.input(name, value) for name, value in zip(names, values, strict=True)]
        self.dense.append(values[0].double().t() @ values[1].double())
        return nodes[0], nodes[1]

    def product(self, lhs: Node, rhs: Node) -> Node:
        return self.joint.call(aten.mm.default, self.joint.call(aten.t.default, lhs), rhs)

    def mark(self, gradient: Node) -> Node:
        arguments = (self.positions, self.channels, self.narrow, B, self.axis)
        return self.joint.call(GATHER, gradient, *arguments)


def rewrite(joint: "Joint") -> tuple[int, list[RewriteResult]]:
    results: list[RewriteResult] = []
    return sample_weight_gradients_pass(joint.graph, report=results.append), results


def check_sampled(
    joint: "Joint", weight: MaskedWeight, gradient: Node, dense: Tensor, products: int = 1
) -> list[RewriteResult]:
    """Sample the blocks of `gradient`; compare results before and after the pass with the float64 oracle `dense`."""
    marker = weight.mark(gradient)
    joint.output(marker)
    expected = read_blocks(dense, POSITIONS, B)
    [before] = joint.run()
    assert torch.equal(before.double(), expected)
    count, results = rewrite(joint)
    assert count == 1
    assert GATHER not in joint.targets()
    assert joint.targets().count(SDDMM) == products
    assert not {aten.mm.default, aten.bmm.default} & set(joint.targets())
    [after] = joint.run()
    assert torch.equal(after.double(), expected)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    return results


@pytest.mark.parametrize("axis", [1, 0], ids=["linear", "conv1d"])
class TestProduct:
    """Both ways to store a weight: inputs on its second axis (`nn.Linear`) or on its first (GPT-2's Conv1D)."""

    def test_direct(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        gradient = weight.product(*weight.use())
        [result] = check_sampled(joint, weight, gradient, weight.dense[0])
        activation = [term for term in joint.graph.nodes if term.name.startswith("primals_x")]
        assert result == RewriteResult(weight.positions, None, None, tuple(activation))
        assert result.narrowed

    @pytest.mark.parametrize(
        ("target", "args"),
        [(aten.t.default, ()), (aten.permute.default, ([1, 0],)), (aten.transpose.int, (0, 1))],
    )
    def test_transposed(self, joint: "Joint", axis: int, target: Any, args: tuple[Any, ...]) -> None:
        weight = MaskedWeight(joint, axis=axis)
        lhs, rhs = weight.use()
        gradient = joint.call(target, weight.product(rhs, lhs), *args)
        check_sampled(joint, weight, gradient, weight.dense[0])
        # The kernel reads both operands as they lie, so no transpose is left.
        assert set(joint.targets()) == {INDEX, SDDMM}

    def test_transposed_twice(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        gradient = weight.product(*weight.use())
        for _ in range(2):
            gradient = joint.call(aten.t.default, gradient)
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_operand_that_lies_transposed(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        first = joint.input(("tangents_9", "primals_9")[1 - axis], integers(M, T, seed=1))
        second = joint.input(("tangents_8", "primals_8")[axis], integers(N, T, seed=2))
        gradient = joint.call(aten.mm.default, first, joint.call(aten.t.default, second))
        [result] = check_sampled(joint, weight, gradient, joint.values[-2].double() @ joint.values[-1].double().t())
        assert result.narrowed

    def test_one_token_as_an_outer_product(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        lhs, rhs = weight.use(tokens=1)
        gradient = joint.call(aten.mul.Tensor, joint.call(aten.t.default, lhs), rhs)
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_batch_of_one(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        lhs, rhs = weight.use()
        operands = [joint.call(aten.unsqueeze.default, node, 0) for node in (joint.call(aten.t.default, lhs), rhs)]
        gradient = joint.call(aten.view.default, joint.call(aten.bmm.default, *operands), [M, N])
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_view_of_the_same_shape(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        gradient = joint.call(aten.view.default, weight.product(*weight.use()), [M, N])
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_without_tokens(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        check_sampled(joint, weight, weight.product(*weight.use(tokens=0)), torch.zeros(M, N, dtype=torch.float64))


class TestCasts:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("operator", ["_to_copy", "convert_element_type"])
    def test_autocast(self, joint: "Joint", dtype: torch.dtype, operator: str) -> None:
        weight = MaskedWeight(joint)
        gradient = weight.product(*weight.use(dtype))
        if operator == "_to_copy":
            gradient = joint.call(aten._to_copy.default, gradient, dtype=torch.float32)
        else:
            gradient = joint.call(cast, gradient, torch.float32)
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_between_transposes(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        lhs, rhs = weight.use(torch.bfloat16)
        gradient = joint.call(aten.t.default, weight.product(rhs, lhs))
        gradient = joint.call(aten.t.default, joint.call(cast, gradient, torch.float32))
        check_sampled(joint, weight, joint.call(aten.t.default, gradient), weight.dense[0])

    def test_a_weight_in_bfloat16(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        check_sampled(joint, weight, weight.product(*weight.use(torch.bfloat16)), weight.dense[0])

    def test_a_weight_in_float64(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        check_sampled(joint, weight, weight.product(*weight.use(torch.float64)), weight.dense[0])

    @pytest.mark.parametrize(("inner", "outer"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
    def test_the_blocks_keep_the_dtype_of_the_gradient(
        self, joint: "Joint", inner: torch.dtype, outer: torch.dtype
    ) -> None:
        weight = MaskedWeight(joint)
        gradient = joint.call(cast, weight.product(*weight.use(inner)), outer)
        check_sampled(joint, weight, gradient, weight.dense[0])

    def test_sampling_rounds_less_than_the_dense_gradient(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        generator = torch.Generator().manual_seed(0)
        gy = joint.input("tangents_9", torch.randn(64, M, generator=generator).bfloat16())
        x = joint.input("primals_9", torch.randn(64, N, generator=generator).bfloat16())
        exact = read_blocks(joint.values[-2].double().t() @ joint.values[-1].double(), POSITIONS, B)
        joint.output(weight.mark(joint.call(cast, weight.product(gy, x), torch.float32)))
        before = (joint.run()[0] - exact).abs().max()
        rewrite(joint)
        after = (joint.run()[0] - exact).abs().max()
        assert after < 1e-4 < before


class TestSums:
    def test_of_two_uses(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        gradient = joint.call(aten.add.Tensor, weight.product(*first), weight.product(*second))
        check_sampled(joint, weight, gradient, weight.dense[0] + weight.dense[1], products=2)

    def test_of_uses_that_differ_in_orientation_and_dtype(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        first, (lhs, rhs) = weight.use(), weight.use(torch.bfloat16)
        turned = joint.call(cast, joint.call(aten.t.default, weight.product(rhs, lhs)), torch.float32)
        gradient = joint.call(aten.add.Tensor, turned, weight.product(*first))
        check_sampled(joint, weight, gradient, weight.dense[0] + weight.dense[1], products=2)

    def test_of_a_product_with_itself(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        product = weight.product(*weight.use())
        # Two sampled products of one activation, hence one launch.
        check_sampled(joint, weight, joint.call(aten.add.Tensor, product, product), 2 * weight.dense[0], products=0)
        assert joint.targets().count(SHARED) == 1

    def test_difference(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        gradient = joint.call(aten.sub.Tensor, weight.product(*first), weight.product(*second))
        check_sampled(joint, weight, gradient, weight.dense[0] - weight.dense[1], products=2)

    def test_difference_of_differences(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        uses = [weight.use() for _ in range(3)]
        first, second, third = (weight.product(*use) for use in uses)
        gradient = joint.call(aten.sub.Tensor, first, joint.call(aten.sub.Tensor, second, third))
        check_sampled(joint, weight, gradient, weight.dense[0] - (weight.dense[1] - weight.dense[2]), products=3)


class TestFactors:
    @pytest.mark.parametrize(
        ("target", "args", "factor"),
        [
            (aten.neg.default, (), -1.0),
            (aten.mul.Tensor, (3.0,), 3.0),
            (aten.mul.Scalar, (3,), 3.0),
            (aten.div.Tensor, (4.0,), 0.25),
            (aten.div.Scalar, (4,), 0.25),
            (aten.mul.Tensor, (0.0,), 0.0),
        ],
    )
    def test_number(self, joint: "Joint", target: Any, args: tuple[Any, ...], factor: float) -> None:
        weight = MaskedWeight(joint)
        gradient = joint.call(target, weight.product(*weight.use()), *args)
        check_sampled(joint, weight, gradient, factor * weight.dense[0])

    @pytest.mark.parametrize(("target", "factor"), [(aten.mul.Tensor, 4.0), (aten.div.Tensor, 0.25)])
    def test_tensor_without_dimensions(self, joint: "Joint", target: Any, factor: float) -> None:
        weight = MaskedWeight(joint)
        scalar = joint.input("tangents_scale", torch.tensor(4.0))
        gradient = joint.call(target, weight.product(*weight.use()), scalar)
        check_sampled(joint, weight, gradient, factor * weight.dense[0])

    def test_of_one_side_of_a_sum(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        tripled = joint.call(aten.mul.Tensor, weight.product(*second), 3.0)
        gradient = joint.call(aten.add.Tensor, weight.product(*first), tripled)
        check_sampled(joint, weight, gradient, weight.dense[0] + 3 * weight.dense[1], products=2)

    def test_of_a_difference(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        difference = joint.call(aten.sub.Tensor, weight.product(*first), weight.product(*second))
        gradient = joint.call(aten.neg.default, joint.call(aten.mul.Tensor, difference, 3.0))
        check_sampled(joint, weight, gradient, -3 * (weight.dense[0] - weight.dense[1]), products=2)


class TestNarrowing:
    def narrow_index(self, joint: "Joint") -> Node:
        [index] = joint.graph.find_nodes(op="call_function", target=INDEX)
        return index

    @pytest.mark.parametrize("axis", [1, 0], ids=["linear", "conv1d"])
    def test_the_forward_half_cuts_the_activation_down(self, joint: "Joint", axis: int) -> None:
        weight = MaskedWeight(joint, axis=axis)
        operands = weight.use()
        hidden = joint.call(aten.cumsum.default, operands[axis], 0)
        lhs, rhs = (hidden, operands[1]) if axis == 0 else (operands[0], hidden)
        values = [value.double() for value in joint.values[-2:]]
        values[axis] = values[axis].cumsum(0)
        check_sampled(joint, weight, weight.product(lhs, rhs), values[0].t() @ values[1])
        index = self.narrow_index(joint)
        assert index.args == (hidden, [None, weight.channels])
        assert index.meta["val"].shape == (T, len(channels_of(POSITIONS, axis)[0]))
        [product] = joint.graph.find_nodes(op="call_function", target=SDDMM)
        assert product.args[axis] is index
        assert product.args[2] is weight.narrow
        # It must come right after the activation: the forward cannot save a copy that the backward makes.
        assert hidden.next is index

    def test_placeholders_stay_in_front(self, joint: "Joint") -> None:
        # AOTAutograd puts the tangents last, so an input of the graph that is an activation has others behind it.
        weight = MaskedWeight(joint)
        x, gy = joint.input("primals_9", integers(T, N, seed=1)), joint.input("tangents_9", integers(T, M, seed=2))
        check_sampled(joint, weight, weight.product(gy, x), joint.values[-1].double().t() @ joint.values[-2].double())
        kinds = [node.op == "placeholder" for node in joint.graph.nodes]
        assert kinds == sorted(kinds, reverse=True)

    def test_two_masks_cut_one_activation_each_to_its_own(self, joint: "Joint") -> None:
        first = MaskedWeight(joint)
        second = MaskedWeight(joint, positions=torch.tensor([[1], [2]]))
        gy, x = first.use()
        other_gy = joint.input("tangents_9", integers(T, M, seed=9))
        markers = [first.mark(first.product(gy, x)), second.mark(second.product(other_gy, x))]
        joint.output(*markers)
        before = joint.run()
        assert rewrite(joint)[0] == 2
        assert joint.targets().count(INDEX) == 2
        for new, old in zip(joint.run(), before, strict=True):
            assert torch.equal(new, old)

    def test_wide_activation_untouched(self, joint: "Joint") -> None:
        everything = torch.ones(3, 4).nonzero().t()
        weight = MaskedWeight(joint, positions=everything)
        joint.output(weight.mark(weight.product(*weight.use())))
        [before] = joint.run()
        count, [result] = rewrite(joint)
        assert (count, result.narrowed) == (1, False)
        assert joint.targets() == [SDDMM]
        [product] = joint.graph.find_nodes(op="call_function", target=SDDMM)
        assert product.args[2] is weight.positions
        assert torch.equal(joint.run()[0], before)

    def test_operands_both_from_the_backward_untouched(self, joint: "Joint") -> None:
        # In a second-order term the supposed activation is a gradient too, and the forward saves no part of it.
        weight = MaskedWeight(joint)
        gy, x = weight.use()
        tangent = joint.input("tangents_9", torch.tensor(-1.0))
        later = joint.call(aten.mul.Tensor, x, tangent)
        [result] = check_sampled(joint, weight, weight.product(gy, later), -weight.dense[0])
        assert not result.narrowed
        assert INDEX not in joint.targets()

    @pytest.mark.parametrize("wide", [False, True])
    def test_a_count_of_channels_that_may_vary_is_judged_by_the_example(self, joint: "Joint", wide: bool) -> None:
        # Layers of one shape with unequal masks share a graph, so a choice of speed alone must add no guard.
        weight = MaskedWeight(joint, positions=torch.ones(3, 4).nonzero().t() if wide else POSITIONS)
        environment = ShapeEnv()
        joint.mode = FakeTensorMode(shape_env=environment)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        for node, value in zip(joint.graph.nodes, list(joint.values), strict=True):
            symbolic = {"symbolic_context": context} if node is weight.channels else {"static_shapes": True}
            node.meta["val"] = joint.mode.from_tensor(value, **symbolic)
        gy, x = weight.use()
        assert (type(weight.channels.meta["val"].shape[0]), type(x.meta["val"].shape[1])) == (torch.SymInt, int)
        joint.output(weight.mark(weight.product(gy, x)))
        [before] = joint.run()
        count, [result] = rewrite(joint)
        assert (count, result.narrowed) == (1, not wide)
        assert not environment.guards
        assert torch.equal(joint.run()[0], before)


class TestRefuses:
    def check_untouched(self, joint: "Joint", weight: MaskedWeight, gradient: Node, *others: Node) -> str:
        joint.output(weight.mark(gradient), *others)
        before, code = joint.run(), str(joint.graph)
        count, [result] = rewrite(joint)
        assert count == 0
        assert str(joint.graph) == code
        assert all(torch.equal(new, old) for new, old in zip(joint.run(), before, strict=True))
        assert result.positions is weight.positions
        assert not result.narrowed
        assert result.reason is not None
        return result.reason

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda joint, node: joint.call(aten.relu.default, node),
            lambda joint, node: joint.call(
                aten.t.default, joint.call(aten.relu.default, joint.call(aten.t.default, node))
            ),
            lambda joint, node: joint.call(aten.mul.Tensor, node, node),
        ],
        ids=["alone", "between transposes", "square"],
    )
    def test_other_operator_untouched(self, joint: "Joint", wrap: "Callable[[Joint, Node], Node]") -> None:
        weight = MaskedWeight(joint)
        reason = self.check_untouched(joint, weight, wrap(joint, weight.product(*weight.use())))
        assert "cannot be sampled through" in reason

    def test_dense_gradient_returned_too_untouched(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        gradient = weight.product(*weight.use())
        assert "used elsewhere" in self.check_untouched(joint, weight, gradient, gradient)

    def test_dense_gradient_read_by_another_operator_untouched(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        product = weight.product(*weight.use())
        norm = joint.call(aten.sum.default, product)
        assert "used elsewhere" in self.check_untouched(joint, weight, joint.call(aten.neg.default, product), norm)

    def test_gradient_from_outside_the_graph_untouched(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        gradient = joint.input("tangents_9", integers(M, N, seed=3))
        assert "outside the graph" in self.check_untouched(joint, weight, gradient)

    def test_graph_without_markers_untouched(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        joint.output(weight.product(*weight.use()))
        code = str(joint.graph)
        assert rewrite(joint) == (0, [])
        assert str(joint.graph) == code

    @pytest.mark.parametrize("opaque_first", [True, False])
    def test_opaque_side_of_a_sum_stays_dense_and_the_other_is_sampled(
        self, joint: "Joint", opaque_first: bool
    ) -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        relu = joint.call(aten.relu.default, weight.product(*second))
        sides = [weight.product(*first), joint.call(aten.t.default, joint.call(aten.t.default, relu))]
        total = joint.call(aten.sub.Tensor, *(reversed(sides) if opaque_first else sides))
        joint.output(weight.mark(total))
        [before] = joint.run()
        count, [result] = rewrite(joint)
        assert count == 1
        assert "relu" in str(result.reason)
        assert joint.targets().count(aten.mm.default) == 1
        assert joint.targets().count(SDDMM) == 1
        [gathered] = joint.graph.find_nodes(op="call_function", target=GATHER)
        assert gathered.args == (relu, weight.positions, weight.channels, weight.narrow, B, 1)
        assert torch.equal(joint.run()[0], before)

    def test_opaque_side_that_is_transposed_is_gathered_transposed(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        lhs, rhs = weight.use()
        relu = joint.call(aten.relu.default, weight.product(rhs, lhs))
        turned = joint.call(aten.t.default, relu)
        joint.output(weight.mark(joint.call(aten.add.Tensor, weight.product(lhs, rhs), turned)))
        [before] = joint.run()
        rewrite(joint)
        assert torch.equal(joint.run()[0], before)


class TestGraphAfterwards:
    @pytest.mark.parametrize("opaque", [False, True])
    def test_a_second_run_changes_nothing(self, joint: "Joint", opaque: bool) -> None:
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        other = weight.product(*second)
        if opaque:
            other = joint.call(aten.relu.default, other)
        joint.output(weight.mark(joint.call(aten.add.Tensor, weight.product(*first), other)))
        rewrite(joint)
        code = str(joint.graph)
        rewrite(joint)
        assert str(joint.graph) == code

    def test_new_nodes_carry_their_value_and_no_other_key(self, joint: "Joint") -> None:
        # A copied `eager_input_vals` describes the old node, and Inductor would believe it.
        weight = MaskedWeight(joint)
        first, second = weight.use(), weight.use()
        total = joint.call(
            aten.add.Tensor, weight.product(*first), joint.call(aten.neg.default, weight.product(*second))
        )
        joint.output(weight.mark(joint.call(aten.mul.Tensor, total, 3.0)))
        for node in joint.graph.nodes:
            node.meta["eager_input_vals"] = node.meta["stack_trace"] = "of the old node"
        old = set(joint.graph.nodes)
        rewrite(joint)
        new = set(joint.graph.nodes) - old
        assert {SDDMM, INDEX, aten.neg.default, aten.mul.Tensor, aten.add.Tensor} == {node.target for node in new}
        for node in new:
            assert node.meta.keys() == {"val"}
            assert node.meta["val"].fake_mode is joint.mode

    def test_values_noted_are_the_values_computed(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint, axis=0)
        joint.output(weight.mark(joint.call(aten.div.Tensor, weight.product(*weight.use(torch.bfloat16)), 4.0)))
        rewrite(joint)
        for node in list(joint.graph.nodes):
            if node.op != "call_function":
                continue
            joint.graph.output_node().args = ((node,),)
            [real] = joint.run()
            noted = node.meta["val"]
            assert (noted.shape, noted.dtype, noted.stride()) == (real.shape, real.dtype, real.stride()), node

    def test_the_narrow_activation_belongs_to_the_checkpointed_region_of_the_activation(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        gy, x = weight.use()
        hidden = joint.call(aten.neg.default, x)
        hidden.meta.update(recompute="must", ac_graph_id=3)
        joint.output(weight.mark(weight.product(gy, hidden)))
        rewrite(joint)
        [index] = joint.graph.find_nodes(op="call_function", target=INDEX)
        assert (index.meta["recompute"], index.meta["ac_graph_id"]) == ("must", 3)
        [product] = joint.graph.find_nodes(op="call_function", target=SDDMM)
        assert product.meta.keys() == {"val"}

    def test_works_without_a_listener_for_the_report(self, joint: "Joint") -> None:
        weight = MaskedWeight(joint)
        joint.output(weight.mark(weight.product(*weight.use())))
        assert sample_weight_gradients_pass(joint.graph) == 1

    def test_each_marker_is_reported_and_counted(self, joint: "Joint") -> None:
        weights = [MaskedWeight(joint), MaskedWeight(joint)]
        gradients = [weight.product(*weight.use()) for weight in weights]
        gradients[1] = joint.call(aten.relu.default, gradients[1])
        joint.output(*(weight.mark(gradient) for weight, gradient in zip(weights, gradients, strict=True)))
        count, results = rewrite(joint)
        assert count == 1
        assert [(result.positions, result.reason is None) for result in results] == [
            (weights[0].positions, True),
            (weights[1].positions, False),
        ]
