"""Which activations are narrowed and which are read whole; every rewrite must leave the gradients as they were."""

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
CHANNELS = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
NARROW = torch.tensor([[0, 1], [0, 1]])


class Layer:
    """The layout of a weight and its output gradient, as inputs of a graph; it may share another layer's `channels`."""

    def __init__(self, joint: "Joint", channels: Node | None = None) -> None:
        self.joint, serial = joint, len(joint.values)
        self.positions = joint.input(f"primals_positions_{serial}", POSITIONS)
        self.channels = channels or joint.input(f"primals_channels_{serial}", CHANNELS)
        self.narrow = joint.input(f"primals_narrow_{serial}", NARROW)
        self.gy = joint.input(f"tangents_{serial}", normal(T, M, seed=serial))

    def mark(self, x: Node) -> Node:
        """Add the gradient of the weight's blocks, for the layer's input `x [T, N]`."""
        self.joint.forward.append(x)
        product = self.joint.call(aten.mm.default, self.joint.call(aten.t.default, self.gy), x)
        return self.joint.call(gather_blocks._opoverload, product, self.positions, self.channels, self.narrow, B, 1)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewrite(joint: "Joint", *gradients: Node) -> list[RewriteResult]:
    joint.output(*gradients)
    before = joint.run()
    results: list[RewriteResult] = []
    assert sample_weight_gradients_pass(joint.graph, report=results.append) == len(results)
    for new, old in zip(joint.run(), before, strict=True):
        torch.testing.assert_close(new, old)
    return results


def copies(joint: "Joint") -> int:
    return joint.targets().count(aten.index.Tensor)


class TestOneCopyForAll:
    def test_weights_with_shared_channels(self, joint: "Joint") -> None:
        first = Layer(joint)
        second = Layer(joint, first.channels)
        x = joint.call(
            aten.mm.default,
            joint.input("primals_1", normal(T, 3, seed=1)),
            joint.input("primals_2", normal(3, N, seed=2)),
        )
        results = rewrite(joint, first.mark(x), second.mark(x))
        assert all(result.narrowed and result.activations == (x,) for result in results)
        assert copies(joint) == 1
        assert joint.targets().count(sddmm_shared._opoverload) == 1

    def test_each_through_a_view_of_its_own(self, joint: "Joint") -> None:
        # Every layer flattens the tokens for itself.
        first = Layer(joint)
        second = Layer(joint, first.channels)
        x = joint.call(aten.neg.default, joint.input("primals_1", normal(2, T // 2, N, seed=1)))
        views = [joint.call(aten.view.default, x, [T, N]) for _ in range(2)]
        results = rewrite(joint, *(layer.mark(view) for layer, view in zip((first, second), views, strict=True)))
        assert [result.activations for result in results] == [(views[0],)] * 2
        assert copies(joint) == 1

    def test_different_views_are_different_activations(self, joint: "Joint") -> None:
        first = Layer(joint)
        second = Layer(joint, first.channels)
        square = joint.call(aten.neg.default, joint.input("primals_1", normal(N, N, seed=1)))
        halves = [joint.call(aten.slice.Tensor, square, 0, start, start + T) for start in (0, T)]
        results = rewrite(joint, *(layer.mark(half) for layer, half in zip((first, second), halves, strict=True)))
        assert [result.activations for result in results] == [(half,) for half in halves]
        assert copies(joint) == 2

    def test_channels_of_their_own(self, joint: "Joint") -> None:
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
        [result] = rewrite(joint, layer.mark(x))
        assert "nearly all" in str(result.whole_reason)

    def test_is_copied_where_it_can_be_recomputed(self, joint: "Joint") -> None:
        # Read whole, it would be saved beside the tensor that it is recomputed from.
        layer = self.layer(joint)
        before = joint.call(aten.cumsum.default, joint.input("primals_1", normal(T, N, seed=1)), 0)
        later = joint.call(aten.mul.Tensor, joint.input("tangents_9", normal(T, N, seed=9)), before)
        [result] = rewrite(joint, layer.mark(joint.call(aten.exp.default, before)), later)
        assert result.narrowed


class TestSavedAnyway:
    """Another node of the backward half reads all of the activation."""

    def product_of_inputs(self, joint: "Joint") -> Node:
        operands = joint.input("primals_1", normal(T, 3, seed=1)), joint.input("primals_2", normal(3, N, seed=2))
        return joint.call(aten.mm.default, *operands)

    def check_whole(self, results: list[RewriteResult], joint: "Joint", reader: Any) -> None:
        [result] = results
        assert not result.narrowed
        assert str(reader) in str(result.whole_reason)
        assert copies(joint) == 0
        [product] = joint.graph.find_nodes(op="call_function", target=sddmm._opoverload)
        assert product.args[1] is result.activations[0]

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

    def test_an_activation_that_can_be_recomputed_is_not_saved(self, joint: "Joint") -> None:
        # `before` is saved, and the kernel that needs `x` recomputes it from `before`.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        x = joint.call(aten.exp.default, before)
        tangent = joint.input("tangents_9", normal(T, N, seed=9))
        later = [joint.call(aten.mul.Tensor, tangent, x), joint.call(aten.mul.Tensor, tangent, before)]
        [result] = rewrite(joint, layer.mark(x), *later)
        assert result.narrowed
        assert copies(joint) == 1

    def test_an_activation_read_in_the_forward_half_only_is_not_saved(self, joint: "Joint") -> None:
        layer = Layer(joint)
        x = self.product_of_inputs(joint)
        [result] = rewrite(joint, layer.mark(x), joint.call(aten.relu.default, x))
        assert result.narrowed

    def test_a_weight_that_stays_dense_saves_it_for_the_other(self, joint: "Joint") -> None:
        layer, dense = Layer(joint), Layer(joint)
        x = self.product_of_inputs(joint)
        product = joint.call(aten.mm.default, joint.call(aten.t.default, dense.gy), x)
        joint.output(layer.mark(x), product)
        results: list[RewriteResult] = []
        sample_weight_gradients_pass(joint.graph, report=results.append)
        assert "keeps it" in str(results[0].whole_reason)

    def test_the_input_of_a_derivative_is_saved(self, joint: "Joint") -> None:
        # The derivative depends on no gradient, but only the backward needs it.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        derivative = joint.call(aten.cos.default, before)
        later = joint.call(aten.mul.Tensor, joint.input("tangents_9", normal(T, N, seed=9)), derivative)
        x = joint.call(aten.sin.default, before)
        [result] = rewrite(joint, layer.mark(x), later)
        assert result.narrowed
        [copy] = joint.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        assert copy.args[0].args[0] is before

    @pytest.mark.parametrize("recomputed", [True, False])
    def test_a_copy_is_made_from_the_tensor_that_cannot_be_recomputed(self, joint: "Joint", recomputed: bool) -> None:
        # The backward reads `middle`, which is certain to be saved only if it cannot be recomputed from `before`.
        layer = Layer(joint)
        before = self.product_of_inputs(joint)
        middle = joint.call(aten.silu.default, before)
        x = joint.call(aten.exp.default, middle)
        tangent = joint.input("tangents_9", normal(T, N, seed=9))
        read = [middle, before] if recomputed else [middle]
        [result] = rewrite(joint, layer.mark(x), *(joint.call(aten.mul.Tensor, tangent, node) for node in read))
        assert result.narrowed
        [copy] = joint.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        assert copy.args[0].args[0] is read[-1]

    @pytest.mark.parametrize("operator", [aten.sum.default, aten.neg.default])
    def test_a_narrow_copy_does_not_save_the_activation(self, joint: "Joint", operator: Any) -> None:
        """Two weights with channels of their own do not make each other read the whole activation."""
        layers = [Layer(joint), Layer(joint)]
        x = self.product_of_inputs(joint)
        results = rewrite(joint, *(layer.mark(x) for layer in layers), joint.call(operator, x))
        assert all(result.narrowed for result in results)
