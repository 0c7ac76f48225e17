import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from specs import spec
from torch import Tensor, nn

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.baselines import SquaredGradient, lift_scores, magnitude_scores, random_scores


def slow_block_sums(matrix: Tensor, b: int) -> Tensor:
    out = torch.zeros(-(-matrix.shape[0] // b), -(-matrix.shape[1] // b), dtype=torch.float64)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            out[i // b, j // b] += matrix[i, j].double()
    return out


OF_8 = SylvaConfig(block_size=8)
sizes, blocks, seeds = st.integers(1, 14), st.integers(1, 8), st.integers(0, 1000)


@given(m=sizes, n=sizes, batches=st.integers(0, 3), b=blocks, seed=seeds)
@settings(deadline=None, max_examples=40)
def test_fisher_sums_the_squares_of_each_batchs_gradient(m: int, n: int, batches: int, b: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    estimator = SquaredGradient(spec(m, n, torch.float64))
    expected = torch.zeros(m, n, dtype=torch.float64)
    for tokens in range(3, 3 + batches):
        x = torch.randn(tokens, n, dtype=torch.float64, generator=generator)
        gy = torch.randn(tokens, m, dtype=torch.float64, generator=generator)
        estimator.update(x, gy)
        gradient = torch.zeros(m, n, dtype=torch.float64)
        for token in range(tokens):
            gradient += torch.outer(gy[token], x[token])
        expected += gradient**2
    torch.testing.assert_close(estimator.block_scores(b), slow_block_sums(expected, b))


def test_fisher_of_one_batch_differs_from_that_of_two() -> None:
    # A batch and its negative cancel in one gradient, never in two squares.
    x, gy = torch.ones(1, 4), torch.ones(1, 4)
    one, two = (SquaredGradient(spec(4, 4)) for _ in range(2))
    one.update(torch.cat([x, -x]), torch.cat([gy, gy]))
    two.update(x, gy)
    two.update(-x, gy)
    assert one.block_scores(4).item() == 0.0
    assert two.block_scores(4).item() == 32.0


def test_fisher_sums_narrow_dtypes_in_float32() -> None:
    estimator = SquaredGradient(spec(8, 8, torch.bfloat16))
    ones = torch.ones(512, 8, dtype=torch.bfloat16)
    for _ in range(3):
        estimator.update(ones, ones)
    assert estimator.block_scores(8).item() == 3 * 64 * 512.0**2


def test_fisher_ignores_dead_tokens_and_survives_none() -> None:
    estimator = SquaredGradient(spec(4, 4))
    estimator.update(torch.randn(3, 4), torch.zeros(3, 4))
    estimator.update(torch.randn(0, 4), torch.zeros(0, 4))
    assert estimator.block_scores(4).item() == 0.0


@given(m=st.integers(1, 40), n=st.integers(1, 40), b=st.integers(8, 20), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_magnitude_sums_squared_weights(m: int, n: int, b: int, seed: int) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    scores = magnitude_scores(weight, SylvaConfig(block_size=b))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_block_sums(weight.double() ** 2, b))


def test_magnitude_of_a_float16_weight_does_not_overflow() -> None:
    weight = torch.full((4, 4), 6e4, dtype=torch.float16)
    assert magnitude_scores(weight, OF_8).item() == 16 * float(weight[0, 0]) ** 2


def test_magnitude_of_a_parameter_carries_no_graph() -> None:
    assert not magnitude_scores(nn.Parameter(torch.ones(4, 4)), OF_8).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lift_sums_the_squares_of_the_low_rank_part(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 56, generator=generator, dtype=torch.float64)
    weight = (left @ right + 0.05 * torch.randn(40, 56, generator=generator, dtype=torch.float64)).to(dtype)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = slow_block_sums(((u[:, :3] * s[:3]) @ v[:3]) ** 2, 8)
    found = lift_scores(nn.Parameter(weight), SylvaConfig(block_size=8, rank=3))
    assert found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_lift_at_full_rank_is_the_magnitude() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    config = SylvaConfig(block_size=8, rank=64)
    torch.testing.assert_close(lift_scores(weight, config), magnitude_scores(weight, config), rtol=1e-5, atol=1e-5)


def test_random_scores_follow_the_seed() -> None:
    weight = torch.zeros(20, 14)
    torch.manual_seed(0)
    first = random_scores(weight, OF_8)
    second = random_scores(weight, OF_8)
    torch.manual_seed(0)
    again = random_scores(weight, OF_8)
    assert first.shape == (3, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len(first.unique()) == 6
