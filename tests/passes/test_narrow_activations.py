"""When an activation is narrowed, and when it is read whole. That results are the same is checked wherever it fires."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.fx import Node

from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes.sample_weight_gradients import RewriteResult, sample_weight_gradients_pass

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
T, M, N, B = 6, 8, 16, 4
POSITIONS = torch.tensor([[0, 1], [1, 3]])
LINES = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
NARROW = torch.tensor([[0, 1], [0, 1]])


class Layer:
    """Inputs of a graph: a weight's layout and the gradient of what it puts out; `channels` may be another's."""

    def __init__(self, joint: "Joint", channels: Node | None = None) -> None:
        self.joint, serial = joint, len(joint.values)
        self.positions = joint.input(f"primals_positions_{serial}", POSITIONS)
        self.channels = channels or joint.input(f"primals_lines_{serial}", LINES)
        self.narrow = joint.input(f"primals_narrow_{serial}", NARROW)
        self.gy = joint.input(f"tangents_{serial}", normal(T, M, seed=serial))

    def mark(self, x: Node) -> Node:
        """The gradient of the weight's blocks, for inputs `x [T, N]`."""
        self.joint.forward.append(x)
        product = self.joint.call(aten.mm.default, self.joint.call(aten.t.default, self.gy), x)
        return self.joint.call(gather_blocks._opoverload, product, self.positions, self.channels, self.narrow, B, 1)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewrite(joint: "Joint", *results: Node) -> list[RewriteResult]:
    joint.output(*results)
    before = joint.run()
    outcomes: list[RewriteResult] = []
    assert sample_weight_gradients_pass(joint.graph, report=outcomes.append) == len(outcomes)
    for new, old in zip(joint.run(), before, strict=True):
        torch.testing.assert_close(new, old)
    return outcomes


def copies(joint: "Joint") -> int:
    return joint.targets().count(aten.index.Tensor)


class TestOneCopyForAll:
    def test_weights_with_shared_lines(self, joint: "Joint") -> None:
        first = Layer(joint)
        second = Layer(joint, first.channels)
        x = joint.call(
            aten.mm.default,
            joint.input("primals_1", normal(T, 3, seed=1)),
            joint.input("primals_2", normal(3, N, seed=2)),
        )
        outcomes = rewrite(joint, first.mark(x), second.mark(x))
        assert all(outcome.narrowed and outcome.activations == (x,) for outcome in outcomes)
        assert copies(joint) == 1
        assert joint.targets().count(sddmm_shared._opoverload) == 1

    def test_each_through_a_view_of_its_own(self, joint: "Joint") -> None:
        # Every layer flattens the tokens for itself.
        first = Layer(joint)
        second = Layer(joint, first.channels)
        x = joint.call(aten.neg.default, joint.input("primals_1", normal(2, T // 2, N, seed=1)))
        views = [joint.call(aten.view.default, x, [T, N]) for _ in range(2)]
        outcomes = rewrite(joint, *(layer.mark(view) for layer, view in zip((first, second), views, strict=True)))
        assert [outcome.activations for outcome in outcomes] == [(views[0],)] * 2
        assert copies(joint) == 1

    def test_different_views_are_different_activations(self, joint: "Joint") -> None:
        first = Layer(joint)
        second = Layer(joint, first.channels)
        square = joint.call(aten.neg.default, joint.input("primals_1", normal(N, N, seed=1)))
        halves = [joint.call(aten.slice.Tensor, square, 0, start, start + T) for start in (0, T)]
        outcomes = rewrite(joint, *(layer.mark(half) for layer, half in zip((first, second), halves, strict=True)))
        assert [outcome.activations for outcome in outcomes] == [(half,) for half in halves]
        assert copies(joint) == 2

    def test_lines_of_their_own(self, joint: "Joint") -> None:
        layers = [Layer(joint), Layer(joint)]
        x = joint.call(aten.neg.default, joint.input("primals_1", normal(T, N, seed=1)))
        rewrite(joint, *(layer.mark(x) for layer in layers))
        assert copies(joint) == 2


class TestWide:
    """Blocks that need every column of an activation."""

    everything = torch.ones(M // B, N // B).nonzero().t()

    def layer(self, joint: "Joint") -> Layer:
        layer = Layer(joint)
        layer.positions, layer.narrow = (joint.input(f"primals_{name}", self.everything) for name in "pq")
        layer.channels = joint.input("primals_all", torch.arange(N))
        return layer

    def test_is_read_whole(self, joint: "Joint") -> None:
        layer = self.layer(joint)
        x = joint.call(aten.cumsum.default, joint.input("primals_1", normal(T, N, seed=1)), 0)
        [outcome] = rewrite(joint, layer.mark(x))
        assert "nearly all" in str(outcome.whole)

    def test_is_copied_where_it_can_be_made_again(self, joint: "Joint") -> None:
        # Read as it is, it would be saved, beside what it is made from.
        layer = self.layer(joint)
        before = joint.call(aten.cumsum.default, joint.input("primals_1", normal(T, N, seed=1)), 0)
        later = joint.call(aten.mul.Tensor, joint.input("tangents_9", normal(T, N, seed=9)), before)
        [outcome] = rewrite(joint, layer.mark(joint.call(aten.exp.default, before)), later)
        assert outcome.narrowed


class TestKeptAnyway:
    """Something else in the backward half reads all of the activation."""

    def product_of_inputs(self, joint: "Joint") -> Node:
        operands = joint.input("primals_1", normal(T, 3, seed=1)), joint.input("primals_2", normal(3, N, seed=2))
        return joint.call(aten.mm.default, *operands)

    def check_whole(self, outcomes: list[RewriteResult], joint: "Joint", keeper: Any) -> None:
        [outcome] = outcomes
        assert not outcome.narrowed
        assert str(keeper) in str(outcome.whole)
        assert copies(joint) == 0
        [product] = joint.graph.find_nodes(op="call_function", target=sddmm._opoverload)
        assert product.args[1] is outcome.activations[0]

    def test_by_a_dense_product(self, joint: "Joint") -> None:
        layer = Layer(joint)
        x = self.product_of_inputs(joint)
        other = joint.call(
            aten.mm.default, joint.call(aten.t.default, x), joint.input("tangents_9", normal(T, 2, seed=9))
        )
        self.check_whole(rewrite(joint, layer.mark(x), other), joint, aten.mm.default)

    def test_by_a_product_that_reads_a_view(self, joint: "Joint") -> None:
        layer = Layer(joint)
        heads = joint.call(
            aten.bmm.default,
            *(joint.input(f"primals_{i}", normal(2, 4, size, seed=i)) for i, size in ((1, 4), (2, T * N // 8))),
        )
        x = joint.call(aten.view.default, heads, [T, N])
        tangent = joint.input("tangents_9", normal(2, T * N // 8, 3, seed=9))
        self.check_whole(
            rewrite(joint, layer.mark(x), joint.call(aten.bmm.default, heads, tangent)), joint, aten.bmm.default
        )

    def test_by_an_activation_function_of_a_product(self, joint: "Joint") -> None:
        layer = Layer(joint)
        x = joint.call(aten.relu.default, self.product_of_inputs(joint))
        later = joint.call(aten.threshold_backward.default, joint.input("tangents_9", normal(T, N, seed=9)), x, 0)
        self.check_whole(rewrite(joint, layer.mark(x), later), joint, aten.threshold_backward.default)

    def test_what_can_be_made_again_is_not_kept(self, joint: "Joint") -> None:
        # The backward holds `before`, from which it makes `x` again within the kernel that needs it.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        x = joint.call(aten.exp.default, before)
        tangent = joint.input("tangents_9", normal(T, N, seed=9))
        later = [joint.call(aten.mul.Tensor, tangent, x), joint.call(aten.mul.Tensor, tangent, before)]
        [outcome] = rewrite(joint, layer.mark(x), *later)
        assert outcome.narrowed
        assert copies(joint) == 1

    def test_read_in_the_forward_half_only_is_not_kept(self, joint: "Joint") -> None:
        layer = Layer(joint)
        x = self.product_of_inputs(joint)
        [outcome] = rewrite(joint, layer.mark(x), joint.call(aten.relu.default, x))
        assert outcome.narrowed

    def test_a_weight_that_stays_dense_keeps_it_for_the_other(self, joint: "Joint") -> None:
        layer, dense = Layer(joint), Layer(joint)
        x = self.product_of_inputs(joint)
        product = joint.call(aten.mm.default, joint.call(aten.t.default, dense.gy), x)
        joint.output(layer.mark(x), product)
        outcomes: list[RewriteResult] = []
        sample_weight_gradients_pass(joint.graph, report=outcomes.append)
        assert "keeps it" in str(outcomes[0].whole)

    def test_what_a_derivative_is_made_from_is_held(self, joint: "Joint") -> None:
        # The derivative depends on no gradient, but only the backward needs it.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        derivative = joint.call(aten.cos.default, before)
        later = joint.call(aten.mul.Tensor, joint.input("tangents_9", normal(T, N, seed=9)), derivative)
        x = joint.call(aten.sin.default, before)
        [outcome] = rewrite(joint, layer.mark(x), later)
        assert outcome.narrowed
        [copy] = joint.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        assert copy.args[0].args[0] is before

    @pytest.mark.parametrize("remade", [True, False])
    def test_a_copy_is_made_from_what_cannot_be_made_again(self, joint: "Joint", remade: bool) -> None:
        # The backward reads `middle`: that it has it from the forward goes without saying only if it cannot make it.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        middle = joint.call(aten.silu.default, before)
        x = joint.call(aten.exp.default, middle)
        tangent = joint.input("tangents_9", normal(T, N, seed=9))
        read = [middle, before] if remade else [middle]
        [outcome] = rewrite(joint, layer.mark(x), *(joint.call(aten.mul.Tensor, tangent, node) for node in read))
        assert outcome.narrowed
        [copy] = joint.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        assert copy.args[0].args[0] is read[-1]

    @pytest.mark.parametrize("operator", [aten.sum.default, aten.neg.default])
    def test_a_narrow_copy_is_no_keeper(self, joint: "Joint", operator: Any) -> None:
        """Two weights with channels of their own do not keep the activation for each other."""
        layers = [Layer(joint), Layer(joint)]
        x = self.product_of_inputs(joint)
        outcomes = rewrite(joint, *(layer.mark(x) for layer in layers), joint.call(operator, x))
        assert all(outcome.narrowed for outcome in outcomes)
