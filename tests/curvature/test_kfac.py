from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from specs import spec
from torch import Tensor

from sylva_compile.curvature.dense import DenseCovariance, DenseFactor
from sylva_compile.curvature.kfac import Kfac, Score


@dataclass
class Data:
    """Inputs `[T, n]` and output gradients `[T, m]`, all tokens alive, and the factors as the paper defines them."""

    x: Tensor
    gy: Tensor

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, G and Γ by a loop over tokens."""
        tokens, m, n = len(self.x), self.gy.shape[1], self.x.shape[1]
        a, g, gradient = (torch.zeros(*shape, dtype=torch.float64) for shape in ((n, n), (m, m), (m, n)))
        for x, gy in zip(self.x.double(), self.gy.double(), strict=True):
            a += torch.outer(x, x) / tokens
            g += torch.outer(gy, gy) / tokens
            gradient += torch.outer(gy, x) / tokens
        return a, g, gradient

    def gains(self, b: int, damping: float) -> Tensor:
        """½ s_Bᵀ (T (G_BB + λ_G I) ⊗ (A_BB + λ_A I))⁻¹ s_B for the sums s over T tokens, the product written out."""
        a, g, gradient = self.factors()
        m, n = gradient.shape
        a = a + damping * a.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        g = g + damping * g.diagonal().mean() * torch.eye(m, dtype=torch.float64)
        out = torch.zeros(-(-m // b), -(-n // b), dtype=torch.float64)
        for r in range(out.shape[0]):
            for c in range(out.shape[1]):
                rows, cols = slice(r * b, (r + 1) * b), slice(c * b, (c + 1) * b)
                curvature = torch.kron(g[rows, rows].contiguous(), a[cols, cols].contiguous())
                total = len(self.x) * gradient[rows, cols].flatten()
                out[r, c] = 0.5 * total @ torch.linalg.solve(len(self.x) * curvature, total)
        return out

    def papers(self, b: int, damping: float) -> Tensor:
        """Block sums of the outer product of the importances, equations 19 and 20 one output and input at a time."""
        a, g, gradient = self.factors()
        m, n = gradient.shape
        a_inverse = torch.linalg.inv(a + damping * a.diagonal().mean() * torch.eye(n, dtype=torch.float64))
        g_inverse = torch.linalg.inv(g + damping * g.diagonal().mean() * torch.eye(m, dtype=torch.float64))
        out = torch.zeros(-(-m // b), -(-n // b), dtype=torch.float64)
        for k in range(m):
            for j in range(n):
                output = gradient[k] @ a @ gradient[k] / g_inverse[k, k]
                inputs = gradient[:, j] @ g @ gradient[:, j] / a_inverse[j, j]
                out[k // b, j // b] += output * inputs
        return out


def draw_data(m: int, n: int, tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> Data:
    """Tokens that share a direction, so that the mean gradient is no noise and the factors are no multiples of I."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator) + 0.5
    gy = torch.randn(tokens, m, generator=generator) * torch.rand(m, generator=generator) + 0.3
    return Data(x.to(dtype), gy.to(dtype))


def dense(data: Data, score: Score, damping: float | None = None) -> Kfac:
    m, n = data.gy.shape[1], data.x.shape[1]
    return Kfac(spec(m, n, data.x.dtype), new_factor=DenseFactor, score=score, damping=damping)


sizes, tokens, blocks, seeds = st.integers(1, 18), st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6)


@given(m=sizes, n=sizes, tokens=tokens, b=blocks, seed=seeds, damping=st.sampled_from([None, 0.01, 1.0]))
@settings(deadline=None, max_examples=60)
def test_gain_is_the_newton_decrement_of_each_block_alone(
    m: int, n: int, tokens: int, b: int, seed: int, damping: float | None
) -> None:
    data = draw_data(m, n, tokens, seed)
    estimator = dense(data, "gain", damping)
    estimator.update(data.x, data.gy)
    expected = data.gains(b, 0.1 if damping is None else damping)
    torch.testing.assert_close(estimator.block_scores(b), expected, rtol=1e-8, atol=1e-12)


@given(m=sizes, n=sizes, tokens=tokens, b=blocks, seed=seeds, damping=st.sampled_from([None, 0.1, 1.0]))
@settings(deadline=None, max_examples=60)
def test_paper_scores_are_equations_19_and_20(
    m: int, n: int, tokens: int, b: int, seed: int, damping: float | None
) -> None:
    data = draw_data(m, n, tokens, seed)
    estimator = dense(data, "paper", damping)
    estimator.update(data.x, data.gy)
    expected = data.papers(b, 1e-3 if damping is None else damping)
    torch.testing.assert_close(estimator.block_scores(b), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("score", ["gain", "paper"])
class TestUpdates:
    def test_two_batches_equal_one(self, score: Score) -> None:
        data = draw_data(6, 7, 20, 0)
        once, twice = dense(data, score), dense(data, score)
        once.update(data.x, data.gy)
        twice.update(data.x[:3], data.gy[:3])
        twice.update(data.x[3:], data.gy[3:])
        torch.testing.assert_close(twice.block_scores(4), once.block_scores(4))

    def test_dead_tokens_change_nothing(self, score: Score) -> None:
        # Padding: large inputs whose output gradients are zero.
        data = draw_data(6, 7, 20, 0)
        padded = Data(data.x.clone(), data.gy.clone())
        padded.x[::3] = 1e3
        padded.gy[::3] = 0.0
        alive = torch.arange(20) % 3 != 0
        with_padding, without = dense(data, score), dense(data, score)
        with_padding.update(padded.x, padded.gy)
        without.update(data.x[alive], data.gy[alive])
        torch.testing.assert_close(with_padding.block_scores(4), without.block_scores(4))

    def test_strided_batches(self, score: Score) -> None:
        data = draw_data(6, 7, 20, 0)
        plain, strided = dense(data, score), dense(data, score)
        plain.update(data.x, data.gy)
        strided.update(data.x.t().contiguous().t(), data.gy.t().contiguous().t())
        torch.testing.assert_close(strided.block_scores(4), plain.block_scores(4))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_narrow_dtypes_are_summed_in_float32(self, score: Score, dtype: torch.dtype) -> None:
        narrow = draw_data(6, 7, 400, 0, dtype)
        wide = Data(narrow.x.double(), narrow.gy.double())
        found, expected = dense(narrow, score), dense(wide, score)
        found.update(narrow.x, narrow.gy)
        expected.update(wide.x, wide.gy)
        sums = [found.gradient, *found.g.state(), *found.inputs.factor("w").state()]
        assert {total.dtype for total in sums} == {torch.float32}
        assert found.block_scores(4).dtype == torch.float64
        torch.testing.assert_close(found.block_scores(4), expected.block_scores(4), rtol=1e-3, atol=1e-9)

    def test_scores_leave_the_sums_alone(self, score: Score) -> None:
        data = draw_data(6, 7, 20, 0)
        estimator = dense(data, score)
        estimator.update(data.x, data.gy)
        first = estimator.block_scores(4)
        torch.testing.assert_close(estimator.block_scores(4), first, rtol=0, atol=0)


@pytest.mark.parametrize("score", ["gain", "paper"])
class TestNoDataOrZeros:
    """No data, or data that is zero: scores are zero, not NaN and not an error."""

    def check_zero(self, estimator: Kfac) -> None:
        scores = estimator.block_scores(4)
        assert scores.shape == (2, 2)
        assert torch.equal(scores, torch.zeros_like(scores))

    def test_no_update(self, score: Score) -> None:
        self.check_zero(dense(draw_data(6, 7, 1, 0), score))

    def test_every_token_dead(self, score: Score) -> None:
        data = draw_data(6, 7, 5, 0)
        estimator = dense(data, score)
        estimator.update(data.x, torch.zeros_like(data.gy))
        self.check_zero(estimator)

    def test_inputs_all_zero(self, score: Score) -> None:
        data = draw_data(6, 7, 5, 0)
        estimator = dense(data, score)
        estimator.update(torch.zeros_like(data.x), data.gy)
        self.check_zero(estimator)

    def test_an_input_that_never_fires_scores_nothing(self, score: Score) -> None:
        data = draw_data(6, 7, 50, 0)
        data.x[:, 4:] = 0.0
        estimator = dense(data, score)
        estimator.update(data.x, data.gy)
        scores = estimator.block_scores(4)
        assert bool((scores[:, 0] > 0).all())
        assert torch.equal(scores[:, 1], torch.zeros(2, dtype=torch.float64))


def test_inverse_diagonal_is_that_of_the_dense_inverse() -> None:
    data = draw_data(5, 9, 4, 0)
    a, _, _ = data.factors()
    damped = a + 0.1 * a.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(DenseCovariance(a).inverse_diagonal(0.1), torch.linalg.inv(damped).diagonal())


@pytest.mark.parametrize("score", ["gain", "paper"])
def test_damping_below_the_rounding_of_the_sums_is_no_error(score: Score) -> None:
    # One direction that all inputs share dwarfs the others; float32 sums then leave A indefinite by their rounding.
    generator = torch.Generator().manual_seed(0)
    estimator = Kfac(spec(8, 128), new_factor=DenseFactor, score=score, damping=1e-6)
    for _ in range(20):
        x = 30 * torch.randn(64, 1, generator=generator) + 1e-3 * torch.randn(64, 128, generator=generator)
        estimator.update(x, torch.randn(64, 8, generator=generator))
    (a,) = estimator.inputs.factor("w").state()
    assert float(torch.linalg.eigvalsh(a.double()).min()) < 0
    scores = estimator.block_scores(32)
    assert bool(torch.isfinite(scores).all())
    assert bool((scores >= 0).all())
