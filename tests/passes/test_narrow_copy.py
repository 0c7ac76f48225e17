"""A narrow copy equals the columns of the activation, whatever tensors it is made from, and reads only the needed ones.

Each test runs for every choice of channels in `CHANNELS`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.fx import Node

from sylva_compile.passes.match_weight_gradient import Operand
from sylva_compile.passes.narrow_copy import narrow_copy

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
INDEX = aten.index.Tensor
B, S, N = 2, 3, 8
T = B * S
CHANNELS: dict[int, list[int]] = {1: [1, 4, 5], 2: [2, 3, 6, 7], 3: [0, 1, 2, 6, 7], 4: []}
"""Channels by block size: single ones, whole blocks, blocks of which the last is cut short, and none."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def check(
    joint: "Joint", activation: Node, saved: Callable[[Node], bool] = lambda node: False, transposed: bool = False
) -> list[Node]:
    """Make the copy, compare it with the columns of the activation, and return the nodes whose columns are selected."""
    channels = next(node for node in joint.graph.nodes if node.name == "primals_channels")
    block_size = next(b for b, chosen in CHANNELS.items() if len(chosen) == channels.meta["val"].shape[0])
    last = list(joint.graph.nodes)[-1]
    copy = narrow_copy(joint.graph, Operand(activation, transposed), channels, block_size, saved)
    with joint.graph.inserting_after(max(last, copy)):
        joint.output(activation, copy)
    joint.graph.lint()
    whole, narrow = joint.run()
    expected = (whole.t() if transposed else whole)[:, CHANNELS[block_size]]
    torch.testing.assert_close(narrow, expected)
    assert (copy.meta["val"].shape, copy.meta["val"].dtype) == (expected.shape, expected.dtype)
    cut = [node.args[0] for node in joint.graph.find_nodes(op="call_function", target=INDEX)]
    by_blocks = [node.meta["val"].shape[-1] == block_size for node in cut]
    assert by_blocks == [block_size == 2] * len(cut)
    return [node.args[0] if node.target is aten.reshape.default else node for node in cut]


@pytest.fixture(autouse=True, params=CHANNELS)
def _channels(joint: "Joint", request: pytest.FixtureRequest) -> None:
    joint.input("primals_channels", torch.tensor(CHANNELS[request.param], dtype=torch.int64))


def flat(joint: "Joint", node: Node) -> Node:
    return joint.call(aten.view.default, node, [T, N])


class TestGoesThrough:
    def test_operators_on_two_products(self, joint: "Joint") -> None:
        gate, up = (joint.input(f"primals_{i}", normal(T, N)) for i in (1, 2))
        shaped = [joint.call(aten.view.default, node, [B, S, N]) for node in (gate, up)]
        hidden = joint.call(aten.mul.Tensor, joint.call(aten.silu.default, shaped[0]), shaped[1])
        assert check(joint, flat(joint, hidden)) == [gate, up]

    def test_a_norm_of_rows_and_a_weight_of_columns(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(B, S, N))
        scale, weight = joint.input("primals_2", normal(B, S, 1)), joint.input("primals_3", normal(N))
        normed = joint.call(aten.mul.Tensor, weight, joint.call(aten.mul.Tensor, x, scale))
        assert set(check(joint, flat(joint, normed))) == {x, weight}

    def test_a_number_that_is_a_tensor(self, joint: "Joint") -> None:
        x, number = joint.input("primals_1", normal(T, N)), joint.input("primals_2", torch.tensor(3.0))
        assert check(joint, joint.call(aten.mul.Tensor, x, number)) == [x]

    def test_keywords(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(T, N))
        assert check(joint, joint.call(aten.gelu.default, x, approximate="tanh")) == [x]

    def test_casts(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(T, N))
        assert check(joint, joint.call(aten._to_copy.default, x, dtype=torch.bfloat16)) == [x]

    def test_a_layout_of_images(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(1, B, S, N))
        copy = joint.call(aten.clone.default, x, memory_format=torch.channels_last)
        [cut] = check(joint, joint.call(aten.reshape.default, joint.call(aten.neg.default, copy), [T, N]))
        assert cut is x

    def test_a_node_that_is_read_twice_is_copied_once(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(T, N))
        sine = joint.call(aten.sin.default, x)
        assert check(joint, joint.call(aten.mul.Tensor, sine, joint.call(aten.exp.default, sine))) == [x]
        assert joint.targets().count(aten.sin.default) == 2


class TestEndsAt:
    def test_a_node_that_is_saved(self, joint: "Joint") -> None:
        residual = joint.call(aten.add.Tensor, *(joint.input(f"primals_{i}", normal(T, N)) for i in (1, 2)))
        assert check(joint, joint.call(aten.neg.default, residual), lambda node: node is residual) == [residual]

    def test_random_numbers(self, joint: "Joint") -> None:
        # A second draw would give other numbers.
        x = joint.call(aten.normal.Tensor_float, joint.input("primals_1", normal(T, N)))
        assert check(joint, joint.call(aten.neg.default, x)) == [x]

    def test_other_operators(self, joint: "Joint") -> None:
        x = joint.call(aten.cumsum.default, joint.input("primals_1", normal(T, N)), 0)
        assert check(joint, x) == [x]

    def test_an_input(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(T, N))
        assert check(joint, x) == [x]

    @pytest.mark.parametrize("shape", [(1, S, N), (S, N), (B, 1, N), (B, 1, 1), (1, 1, N), (1,)])
    def test_broadcasts_that_are_not_of_rows(self, joint: "Joint", shape: tuple[int, ...]) -> None:
        x, other = joint.input("primals_1", normal(B, S, N)), joint.input("primals_2", normal(*shape))
        total = joint.call(aten.add.Tensor, x, other)
        [cut] = check(joint, flat(joint, total))
        assert cut is total

    def test_a_move_to_another_device(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(T, N))
        moved = joint.call(aten._to_copy.default, x, device=torch.device("meta"))
        channels = next(node for node in joint.graph.nodes if node.name == "primals_channels")
        narrow_copy(joint.graph, Operand(joint.call(aten.sin.default, moved), False), channels, 2, lambda node: False)
        [cut] = joint.graph.find_nodes(op="call_function", target=INDEX)
        assert cut.args[0].meta["val"].device.type == "meta"

    def test_a_view_that_moves_columns(self, joint: "Joint") -> None:
        x = joint.input("primals_1", normal(N, T))
        turned = joint.call(aten.view.default, joint.call(aten.neg.default, x), [T, N])
        assert check(joint, turned) == [turned]

    def test_a_transpose(self, joint: "Joint") -> None:
        x = joint.call(aten.neg.default, joint.input("primals_1", normal(N, T)))
        [cut] = check(joint, x, transposed=True)
        assert cut.target is aten.permute.default

    def test_a_long_way(self, joint: "Joint") -> None:
        x: Any = joint.input("primals_1", normal(T, N))
        first = x
        for _ in range(30):
            x = joint.call(aten.sin.default, x)
        assert check(joint, x) != [first]


def test_a_square_is_no_row_of_columns(joint: "Joint") -> None:
    """With as many tokens as columns, the pass must not mistake a row for a column."""
    x = joint.input("primals_1", normal(N, N))
    column, row = joint.input("primals_2", normal(N, 1)), joint.input("primals_3", normal(1, N))
    total = joint.call(aten.add.Tensor, joint.call(aten.mul.Tensor, x, column), row)
    check(joint, total)
