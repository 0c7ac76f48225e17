import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes.merge_products import merge_products

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
SDDMM, SHARED = sddmm._opoverload, sddmm_shared._opoverload
T, M, N, B = 5, 10, 14, 4


def numbers(joint: "Joint", name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
    generator = torch.Generator().manual_seed(len(joint.values))
    return joint.input(name, torch.randn(*shape, generator=generator).to(dtype))


def product(joint: "Joint", left: Node, right: Node) -> Node:
    positions = joint.graph.find_nodes(op="placeholder", target="positions")
    return joint.call(SDDMM, left, right, positions[0], B)


def inputs(joint: "Joint", count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Node], Node]:
    joint.input("positions", torch.tensor([[0, 0, 2], [1, 3, 0]]))
    lefts = [numbers(joint, f"tangents_{index}", T, M + index, dtype=dtype) for index in range(count)]
    return lefts, numbers(joint, "primals_x", T, N, dtype=dtype)


def check(joint: "Joint", products: list[Node], results: list[Node], merged: int) -> None:
    joint.output(*results)
    before = joint.run()
    assert merge_products(joint.graph, products) == merged
    joint.graph.lint()
    for new, old in zip(joint.run(), before, strict=True):
        assert torch.equal(new, old)


def test_products_of_one_activation_become_one(joint: "Joint") -> None:
    lefts, x = inputs(joint, 3)
    products = [product(joint, left, x) for left in lefts]
    check(joint, products, products, 2)
    assert joint.targets() == [SHARED, operator.getitem, operator.getitem, operator.getitem]


def test_later_readers_read_the_parts(joint: "Joint") -> None:
    lefts, x = inputs(joint, 2)
    products = [product(joint, left, x) for left in lefts]
    results = [joint.call(aten.neg.default, node) for node in products]
    check(joint, products, results, 1)


def test_alone_untouched(joint: "Joint") -> None:
    lefts, x = inputs(joint, 1)
    products = [product(joint, lefts[0], x)]
    check(joint, products, products, 0)
    assert joint.targets() == [SDDMM]


def test_another_activation_in_between_untouched(joint: "Joint") -> None:
    lefts, x = inputs(joint, 2)
    other = numbers(joint, "primals_y", T, N)
    products = [product(joint, lefts[0], x), product(joint, lefts[0], other), product(joint, lefts[1], x)]
    check(joint, products, products, 0)


def test_one_that_is_read_before_the_other_exists_untouched(joint: "Joint") -> None:
    lefts, x = inputs(joint, 2)
    first = product(joint, lefts[0], x)
    early = joint.call(aten.sum.default, first)
    second = product(joint, joint.call(aten.mul.Tensor, lefts[1], early), x)
    check(joint, [first, second], [early, second], 0)


def test_unequal_dtypes_untouched(joint: "Joint") -> None:
    joint.input("positions", torch.tensor([[0], [1]]))
    products = [
        product(joint, numbers(joint, f"tangents_{i}", T, M, dtype=d), numbers(joint, f"primals_{i}", T, N, dtype=d))
        for i, d in enumerate((torch.float32, torch.bfloat16))
    ]
    check(joint, products, products, 0)


def test_gates_go_along_and_unequal_ones_stay_apart(joint: "Joint") -> None:
    lefts, x = inputs(joint, 3)
    positions = joint.graph.find_nodes(op="placeholder", target="positions")[0]
    gates = [joint.input(f"primals_gate_{k}", torch.tensor(k == 0)) for k in range(2)]
    owned = [gates[0], gates[0], gates[1]]
    products = [joint.call(SDDMM, left, x, positions, B, gate) for left, gate in zip(lefts, owned, strict=True)]
    check(joint, products, products, 1)
    assert joint.targets().count(SHARED) == joint.targets().count(SDDMM) == 1
    assert not bool(joint.run()[2].any())
    assert bool(joint.run()[1].any())
