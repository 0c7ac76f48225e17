import logging

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sylva_compile.curvature.importance import (
    _say_once,
    damped_cholesky,
    diagonal_blocks,
    gain_scores,
    importance,
    paper_scores,
)


def covariance(size: int, seed: int, rank: int | None = None) -> Tensor:
    z = torch.randn(size, rank or 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z @ z.t()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_importance_of_each_output_and_input() -> None:
    m, n = 5, 7
    a, g, gradient = covariance(n, 0), covariance(m, 1), random(m, n, seed=2)
    a_inverse, g_inverse = torch.linalg.inv(a), torch.linalg.inv(g)
    outputs, inputs = importance(gradient, gradient @ a, g @ gradient, a_inverse.diagonal(), g_inverse.diagonal())
    for k in range(m):
        torch.testing.assert_close(outputs[k], gradient[k] @ a @ gradient[k] / g_inverse[k, k])
    for j in range(n):
        torch.testing.assert_close(inputs[j], gradient[:, j] @ g @ gradient[:, j] / a_inverse[j, j])


@given(m=st.integers(1, 20), n=st.integers(1, 20), b=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_paper_scores_are_block_sums_of_the_outer_product(m: int, n: int, b: int, seed: int) -> None:
    outputs, inputs = random(m, seed=seed).abs(), random(n, seed=seed + 1).abs()
    outer = torch.outer(outputs, inputs)
    scores = paper_scores(outputs, inputs, b)
    assert scores.shape == (-(-m // b), -(-n // b))
    for r in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            torch.testing.assert_close(scores[r, c], outer[r * b : (r + 1) * b, c * b : (c + 1) * b].sum())


@given(m=st.integers(1, 20), n=st.integers(1, 20), b=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_gain_of_every_block_with_the_kronecker_product_written_out(m: int, n: int, b: int, seed: int) -> None:
    a, g, gradient = covariance(n, seed), covariance(m, seed + 1), random(m, n, seed=seed + 2)
    scores = gain_scores(gradient, diagonal_blocks(a, b), diagonal_blocks(g, b), 0.1)
    assert scores.shape == (-(-m // b), -(-n // b))
    a = a + 0.1 * a.diagonal().mean() * torch.eye(n)
    g = g + 0.1 * g.diagonal().mean() * torch.eye(m)
    for r in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            rows, cols = slice(r * b, (r + 1) * b), slice(c * b, (c + 1) * b)
            vector = gradient[rows, cols].flatten()
            curvature = torch.kron(g[rows, rows].contiguous(), a[cols, cols].contiguous())
            torch.testing.assert_close(scores[r, c], 0.5 * vector @ torch.linalg.solve(curvature, vector))


def test_gain_of_one_block_that_is_the_whole_weight_is_the_decrease_of_a_newton_step() -> None:
    # On the quadratic model g·w + ½ wᵀ (G ⊗ A) w the best step wins exactly the gain.
    m, n = 3, 4
    a, g, gradient = covariance(n, 0), covariance(m, 1), random(m, n, seed=2)
    [[gain]] = gain_scores(gradient, diagonal_blocks(a, 4), diagonal_blocks(g, 4), 1e-12)
    curvature, vector = torch.kron(g, a), gradient.flatten()
    step = -torch.linalg.solve(curvature, vector)
    torch.testing.assert_close(gain, -(vector @ step + 0.5 * step @ curvature @ step))


@given(size=st.integers(1, 30), b=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_diagonal_blocks_are_zero_beyond_the_edge(size: int, b: int) -> None:
    matrix = random(size, size, seed=0)
    blocks = diagonal_blocks(matrix, b)
    assert blocks.shape == (-(-size // b), b, b)
    for k, block in enumerate(blocks):
        inside = matrix[k * b : (k + 1) * b, k * b : (k + 1) * b]
        expected = torch.zeros(b, b, dtype=torch.float64)
        expected[: len(inside), : len(inside)] = inside
        assert torch.equal(block, expected)


class TestDampedCholesky:
    def test_factors_of_the_damped_blocks(self) -> None:
        matrix = covariance(10, 0)
        factors = damped_cholesky(diagonal_blocks(matrix, 4), 10, 0.1)
        damped = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(10)
        for k, factor in enumerate(factors):
            inside = damped[k * 4 : k * 4 + 4, k * 4 : k * 4 + 4]
            size = len(inside)
            torch.testing.assert_close((factor @ factor.t())[:size, :size], inside)
            assert torch.equal(factor, factor.tril())

    def test_damping_is_relative_to_the_scale(self) -> None:
        blocks = diagonal_blocks(covariance(8, 0), 4)
        small, large = damped_cholesky(blocks, 8, 0.1), damped_cholesky(1e12 * blocks, 8, 0.1)
        torch.testing.assert_close(large, 1e6 * small)

    def test_a_singular_block_with_damping_needs_no_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        factors = damped_cholesky(covariance(4, 0, rank=1)[None], 4, 0.1)
        assert bool(torch.isfinite(factors).all())
        assert not caplog.messages

    def test_only_an_indefinite_block_is_damped_more_and_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        _say_once.cache_clear()
        good, bad = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([4.0, 4.0, 1.0, -1.0]).double())
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                factors = damped_cholesky(torch.stack([good, bad]), 8, 0.01)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
        assert "1 of 2 curvature blocks" in caplog.messages[1]
        lam = 0.01 * (good.trace() + bad.trace()) / 8
        torch.testing.assert_close(factors[0] @ factors[0].t(), good + lam * torch.eye(4))
        raised = factors[1] @ factors[1].t() - bad
        torch.testing.assert_close(raised, raised[0, 0] * torch.eye(4, dtype=torch.float64))
        # Tenfold steps: the first that makes the block positive, and no further.
        assert 1.0 < raised[0, 0] <= 10.0

    def test_a_singular_block_without_damping_is_damped(self) -> None:
        factors = damped_cholesky(covariance(4, 0, rank=1)[None], 4, 0.0)
        assert bool(torch.isfinite(factors).all())

    def test_zeros_with_and_without_damping(self) -> None:
        for damping in (0.1, 0.0):
            factors = damped_cholesky(torch.zeros(2, 4, 4, dtype=torch.float64), 7, damping)
            assert bool(torch.isfinite(factors).all())
            assert bool((factors.diagonal(dim1=1, dim2=2) > 0).all())

    def test_not_finite_is_an_error(self) -> None:
        with pytest.raises(ArithmeticError, match="finite"):
            damped_cholesky(torch.full((1, 4, 4), torch.nan, dtype=torch.float64), 4, 0.1)
