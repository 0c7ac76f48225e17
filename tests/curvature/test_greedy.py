"""The greedy choice against the quadratic model written out with its Kronecker product."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sylva_compile.curvature.dense import DenseCovariance
from sylva_compile.curvature.greedy import Whitened, choose_greedily
from sylva_compile.curvature.hierarchy import Hierarchy
from sylva_compile.curvature.importance import diagonal_blocks, gain_scores

F64 = torch.float64


def covariance(size: int, seed: int, tokens: int = 0) -> Tensor:
    """Return the covariance of tokens that share a direction, so that blocks far apart win the same decrease."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or size + 4
    z = torch.randn(tokens, size, dtype=F64, generator=generator)
    z += 2 * torch.randn(tokens, 1, dtype=F64, generator=generator)
    return z.t() @ z / tokens


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def slow_choice(gradient: Tensor, a: Tensor, g: Tensor, b: int, damping: float, count: int) -> set[tuple[int, int]]:
    """Choose block by block on `wᵀ c + ½ wᵀ (G ⊗ A) w` for the whole weight w, solving each step on its own block."""
    m, n = gradient.shape
    a = a + damping * a.diagonal().mean() * torch.eye(n, dtype=F64)
    g = g + damping * g.diagonal().mean() * torch.eye(m, dtype=F64)
    curvature, left = torch.kron(g, a), gradient.flatten().clone()
    places = {
        (r, c): torch.arange(m * n).view(m, n)[r * b : (r + 1) * b, c * b : (c + 1) * b].flatten()
        for r in range(-(-m // b))
        for c in range(-(-n // b))
    }
    chosen: set[tuple[int, int]] = set()
    for _ in range(count):
        steps = {
            place: torch.linalg.solve(curvature[index[:, None], index], left[index])
            for place, index in places.items()
            if place not in chosen
        }
        best = max(steps, key=lambda place: float(left[places[place]] @ steps[place]))
        chosen.add(best)
        left = left - curvature[:, places[best]] @ steps[best]
    return chosen


def as_set(chosen: Tensor) -> set[tuple[int, int]]:
    return {(row, column) for row, column in chosen.nonzero().tolist()}


def everything(m: int, n: int, b: int) -> Tensor:
    return torch.ones(-(-m // b), -(-n // b), dtype=torch.bool)


@given(
    m=st.integers(1, 14),
    n=st.integers(1, 14),
    b=st.integers(1, 6),
    share=st.floats(0, 1),
    damping=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=80)
def test_equals_the_quadratic_model_written_out(
    m: int, n: int, b: int, share: float, damping: float, seed: int
) -> None:
    a, g, gradient = covariance(n, seed), covariance(m, seed + 1), random(m, n, seed=seed + 2)
    allowed = everything(m, n, b)
    count = round(share * allowed.numel())
    found = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), b, damping, count, allowed)
    assert found.dtype == torch.bool
    assert as_set(found) == slow_choice(gradient, a, g, b, damping, count)


def test_the_first_block_is_that_of_the_highest_gain() -> None:
    a, g, gradient = covariance(12, 0), covariance(10, 1), random(10, 12, seed=2)
    gains = gain_scores(gradient, diagonal_blocks(a, 4), diagonal_blocks(g, 4), 0.1)
    found = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), 4, 0.1, 1, everything(10, 12, 4))
    assert found.flatten().nonzero().tolist() == [[int(gains.argmax())]]


def test_without_correlations_the_highest_gains_are_chosen() -> None:
    a = torch.block_diag(*(covariance(4, seed) for seed in range(3)))
    g = torch.block_diag(*(covariance(4, seed) for seed in range(3, 6)))
    gradient = random(12, 12, seed=6)
    gains = gain_scores(gradient, diagonal_blocks(a, 4), diagonal_blocks(g, 4), 0.1)
    found = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), 4, 0.1, 4, everything(12, 12, 4))
    assert set(found.flatten().nonzero().flatten().tolist()) == set(gains.flatten().topk(4).indices.tolist())


def test_a_copy_of_an_input_has_no_gain_left() -> None:
    """Inputs 4 to 7 are inputs 0 to 3 again, with the second highest gain; the third block is new."""
    x = random(200, 8, seed=0)
    x = torch.cat([x[:, :4], x[:, :4], x[:, 4:]], dim=1)
    a, g = x.t() @ x / 200, torch.eye(4, dtype=F64)
    gradient = torch.cat([torch.ones(4, 8, dtype=F64), 0.8 * torch.ones(4, 4, dtype=F64)], dim=1)
    gains = gain_scores(gradient, diagonal_blocks(a, 4), diagonal_blocks(g, 4), 1e-3)[0]
    assert gains[1] > gains[2]
    found = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), 4, 1e-3, 2, everything(4, 12, 4))
    assert found.tolist() == [[True, False, True]]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_exactly_count_of_the_allowed_blocks_are_chosen(count: int) -> None:
    allowed = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1]]).bool()
    a, g, gradient = covariance(11, 0), covariance(9, 1), random(9, 11, seed=2)
    found = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), 4, 0.1, count, allowed)
    assert int(found.sum()) == count
    assert not bool((found & ~allowed).any())
    assert int(allowed.sum()) == 5


def test_no_gradient_and_no_curvature_take_the_first_blocks() -> None:
    zero = DenseCovariance(torch.zeros(8, 8, dtype=F64))
    found = choose_greedily(torch.zeros(8, 8, dtype=F64), zero, zero, 4, 0.1, 2, everything(8, 8, 4))
    assert found.tolist() == [[True, True], [False, False]]


def test_a_hierarchy_of_full_rank_chooses_like_the_dense_factors() -> None:
    a, g, gradient = covariance(37, 0), covariance(22, 1), random(22, 37, seed=2)
    dense = choose_greedily(gradient, DenseCovariance(a), DenseCovariance(g), 5, 0.1, 12, everything(22, 37, 5))
    hierarchies = [Hierarchy.from_dense(matrix, 2, 40) for matrix in (a, g)]
    assert torch.equal(choose_greedily(gradient, *hierarchies, 5, 0.1, 12, everything(22, 37, 5)), dense)


@given(seed=st.integers(0, 10**6), rank=st.integers(0, 3), damping=st.sampled_from([1e-6, 1e-3, 0.1]))
@settings(deadline=None, max_examples=40)
def test_truncated_factors_that_are_indefinite_still_give_the_count(seed: int, rank: int, damping: float) -> None:
    a, g = (Hierarchy.from_dense(covariance(40, seed + at, tokens=12), 3, rank) for at in (0, 1))
    found = choose_greedily(random(40, 40, seed=seed), a, g, 4, damping, 60, everything(40, 40, 4))
    assert int(found.sum()) == 60


class TestWhitened:
    def test_columns_of_a_positive_matrix_are_exact(self) -> None:
        matrix = covariance(38, 0, tokens=12)
        whole = Whitened(DenseCovariance(matrix), 38, 4, 1e-3)
        found = torch.cat([whole.columns(block) for block in range(10)], dim=1)
        damped = torch.eye(40, dtype=F64)
        damped[:38, :38] = matrix + 1e-3 * matrix.diagonal().mean() * torch.eye(38, dtype=F64)
        expected = whole.rows(whole.rows(damped).t()).t()
        torch.testing.assert_close(found[:38, :38], expected[:38, :38])
        assert not bool(found[38:, :36].any())

    def test_entries_that_truncation_makes_too_large_are_clamped(self) -> None:
        indefinite = torch.eye(8, dtype=F64)
        indefinite[0, 4] = indefinite[4, 0] = -3.0
        found = Whitened(DenseCovariance(indefinite), 8, 4, 1e-3).columns(0)
        assert found[4].tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_a_gain_that_is_not_finite_is_an_error() -> None:
    gradient = torch.full((8, 8), 1e300, dtype=F64)
    unit = DenseCovariance(1e-30 * torch.eye(8, dtype=F64))
    with pytest.raises(ArithmeticError, match="not finite"):
        choose_greedily(gradient, unit, unit, 4, 0.1, 2, everything(8, 8, 4))
