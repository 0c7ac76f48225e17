import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from specs import spec
from torch import Tensor

from sylva_compile.curvature.baselines import SquaredGradient, magnitude_scores, random_scores


def slow_block_sums(matrix: Tensor, b: int) -> Tensor:
    out = torch.zeros(-(-matrix.shape[0] // b), -(-matrix.shape[1] // b), dtype=torch.float64)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            out[i // b, j // b] += matrix[i, j].double()
    return out


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


@given(m=sizes, n=sizes, b=blocks, seed=seeds)
@settings(deadline=None, max_examples=40)
def test_magnitude_sums_squared_weights(m: int, n: int, b: int, seed: int) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    scores = magnitude_scores(weight, b)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_block_sums(weight.double() ** 2, b))


def test_magnitude_of_a_float16_weight_does_not_overflow() -> None:
    weight = torch.full((4, 4), 6e4, dtype=torch.float16)
    assert magnitude_scores(weight, 4).item() == 16 * float(weight[0, 0]) ** 2


def test_magnitude_of_a_parameter_carries_no_graph() -> None:
    assert not magnitude_scores(torch.nn.Parameter(torch.ones(4, 4)), 4).requires_grad


def test_random_scores_follow_the_seed() -> None:
    weight = torch.zeros(10, 7)
    torch.manual_seed(0)
    first = random_scores(weight, 4)
    second = random_scores(weight, 4)
    torch.manual_seed(0)
    again = random_scores(weight, 4)
    assert first.shape == (3, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len(first.unique()) == 6
