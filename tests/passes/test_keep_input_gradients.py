import operator
from typing import TYPE_CHECKING

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  it defines the operators
from torch.fx import Node

from sylva_compile.passes.keep_input_gradients import keep_input_gradients

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

BOTH = torch.ops.transformers.grouped_mm_fallback_backward.default
FORWARD = torch.ops.transformers.grouped_mm_fallback.default


@pytest.fixture
def both(joint: "Joint") -> Node:
    x = joint.input("primals_1", torch.randn(7, 6))
    weight = joint.input("primals_2", torch.randn(3, 5, 6).transpose(1, 2))
    offsets = joint.input("primals_3", torch.tensor([2, 2, 7], dtype=torch.int32))
    gy = joint.input("tangents_1", torch.randn(7, 5))
    return joint.call(BOTH, x, weight, offsets, gy)


def test_the_gradient_of_the_input_alone_has_the_same_bits(joint: "Joint", both: Node) -> None:
    joint.output(joint.call(operator.getitem, both, 0))
    (before,) = joint.run()
    assert keep_input_gradients(joint.graph) == 1
    joint.graph.lint()
    assert BOTH not in joint.targets() and FORWARD in joint.targets()
    (after,) = joint.run()
    assert torch.equal(after, before)
    assert keep_input_gradients(joint.graph) == 0


def test_a_dense_gradient_that_is_read_is_untouched(joint: "Joint", both: Node) -> None:
    joint.output(joint.call(operator.getitem, both, 0), joint.call(operator.getitem, both, 1))
    assert keep_input_gradients(joint.graph) == 0
    assert joint.targets().count(BOTH) == 1
