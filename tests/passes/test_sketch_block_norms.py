from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sylva_compile.kernels.block_norms import block_norms, pool_squares
from sylva_compile.passes.sketch_block_norms import sketch_block_norms_pass

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten
NORMS = block_norms._opoverload
T, M, N, B = 5, 10, 14, 4


def by_loops(pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return Σ scale² Σₜ ‖gyₜ[r]‖² ‖xₜ[c]‖² over the uses of a weight."""
    out = torch.zeros(-(-M // B), -(-N // B), dtype=torch.float64)
    for gy, x, scale in pairs:
        for r in range(out.shape[0]):
            for c in range(out.shape[1]):
                rows, cols = gy[:, r * B : (r + 1) * B].double(), x[:, c * B : (c + 1) * B].double()
                out[r, c] += scale**2 * (rows.square().sum(1) * cols.square().sum(1)).sum()
    return out


def operands(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, M, generator=generator), torch.randn(T, N, generator=generator)


def test_the_op_is_exact_by_itself() -> None:
    gradient = torch.randn(M, N)
    expected = torch.stack(
        [torch.stack([part.square().sum() for part in rows.split(B, 1)]) for rows in gradient.split(B, 0)]
    )
    torch.testing.assert_close(block_norms(gradient, B, True), expected)
    torch.testing.assert_close(pool_squares(gradient, B).sum(0), expected.sum(0))
    torch.library.opcheck(block_norms, (gradient, B, False))
    torch.library.opcheck(pool_squares, (gradient.bfloat16(), B))


def test_products_become_sketches_of_the_same_uses(joint: "Joint") -> None:
    total, pairs = None, []
    for seed, scale in ((0, 1.0), (1, -3.0)):
        gy, x = operands(seed)
        pairs.append((gy, x, scale))
        left, right = joint.input(f"tangents_{seed}", gy), joint.input(f"primals_{seed}", x)
        mm = joint.call(aten.mm.default, joint.call(aten.t.default, left), right)
        mm = joint.call(aten.mul.Tensor, mm, scale)
        total = mm if total is None else joint.call(aten.add.Tensor, total, mm)
    joint.output(joint.call(NORMS, total, B, True))
    assert sketch_block_norms_pass(joint.graph) == 1
    assert sketch_block_norms_pass(joint.graph) == 0
    joint.graph.eliminate_dead_code()
    [norms] = joint.run()
    torch.testing.assert_close(norms.double(), by_loops(pairs), rtol=1e-5, atol=1e-6)
    assert NORMS not in joint.targets()


@pytest.mark.parametrize("sketch", [False, True])
def test_refuses_exact_norms_and_gradients_from_elsewhere(joint: "Joint", sketch: bool) -> None:
    gy, x = operands(0)
    gradient = joint.input("tangents_1", gy.t() @ x)
    if not sketch:
        gradient = joint.call(
            aten.mm.default, joint.call(aten.t.default, joint.input("tangents_2", gy)), joint.input("primals_1", x)
        )
    joint.output(joint.call(NORMS, gradient, B, sketch))
    before = str(joint.graph)
    assert sketch_block_norms_pass(joint.graph) == 0
    assert str(joint.graph) == before
