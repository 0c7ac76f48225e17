import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from specs import spec
from torch import Tensor

from sylva_compile.curvature.blockwise import BlockFactor
from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.kfac import Kfac


def batch(m: int, n: int, tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs `[T, n]` and output gradients `[T, m]`, some of them dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator) + 0.5
    gy = torch.randn(tokens, m, generator=generator) * torch.rand(m, generator=generator) + 0.3
    gy[torch.rand(tokens, generator=generator) < 0.3] = 0.0
    return x.to(dtype), gy.to(dtype)


def blockwise(x: Tensor, gy: Tensor, b: int, damping: float | None = None) -> Kfac:
    new_factor = functools.partial(BlockFactor, block_size=b)
    return Kfac(spec(gy.shape[1], x.shape[1], x.dtype), new_factor=new_factor, score="gain", damping=damping)


sizes = st.integers(1, 40)


@given(
    m=sizes,
    n=sizes,
    tokens=st.integers(0, 30),
    b=st.integers(1, 16),
    seed=st.integers(0, 10**6),
    damping=st.sampled_from([None, 1e-3, 1.0]),
)
@settings(deadline=None, max_examples=80)
def test_scores_equal_those_of_the_dense_factors(
    m: int, n: int, tokens: int, b: int, seed: int, damping: float | None
) -> None:
    x, gy = batch(m, n, tokens, seed)
    blocks, dense = (
        blockwise(x, gy, b, damping),
        Kfac(spec(m, n, x.dtype), new_factor=DenseFactor, score="gain", damping=damping),
    )
    blocks.update(x, gy)
    dense.update(x, gy)
    torch.testing.assert_close(blocks.block_scores(b), dense.block_scores(b), rtol=1e-8, atol=1e-12)


def test_gain_of_one_block_with_its_kronecker_product_written_out() -> None:
    # The lower right block, over both edges: [2, 3] of a weight [6, 7] in blocks of 4.
    x, gy = batch(6, 7, 50, 0)
    estimator = blockwise(x, gy, 4)
    estimator.update(x, gy)
    alive = (gy != 0).any(1)
    x, gy, tokens = x[alive], gy[alive], int(alive.sum())
    assert tokens < 50
    a, g, gradient = x.t() @ x / tokens, gy.t() @ gy / tokens, gy.t() @ x / tokens
    a += 0.1 * a.diagonal().mean() * torch.eye(7)
    g += 0.1 * g.diagonal().mean() * torch.eye(6)
    curvature = torch.kron(g[4:, 4:].contiguous(), a[4:, 4:].contiguous())
    vector = gradient[4:, 4:].flatten()
    expected = tokens * 0.5 * vector @ torch.linalg.inv(curvature) @ vector
    torch.testing.assert_close(estimator.block_scores(4)[1, 1], expected)


def test_two_batches_equal_one() -> None:
    x, gy = batch(6, 7, 20, 0)
    once, twice = blockwise(x, gy, 4), blockwise(x, gy, 4)
    once.update(x, gy)
    twice.update(x[:9], gy[:9])
    twice.update(x[9:], gy[9:])
    torch.testing.assert_close(twice.block_scores(4), once.block_scores(4))


def test_dead_tokens_change_nothing() -> None:
    x, gy = batch(6, 7, 20, 0)
    alive = (gy != 0).any(1)
    assert 0 < int(alive.sum()) < 20
    with_padding, without = blockwise(x, gy, 4), blockwise(x, gy, 4)
    with_padding.update(torch.where(alive[:, None], x, 1e3), gy)
    without.update(x[alive], gy[alive])
    torch.testing.assert_close(with_padding.block_scores(4), without.block_scores(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, gy = batch(6, 7, 400, 0, dtype)
    narrow, wide = blockwise(x, gy, 4), blockwise(x.double(), gy.double(), 4)
    narrow.update(x, gy)
    wide.update(x.double(), gy.double())
    assert {total.dtype for total in (narrow.gradient, *narrow.g.state())} == {torch.float32}
    torch.testing.assert_close(narrow.block_scores(4), wide.block_scores(4), rtol=1e-3, atol=1e-9)


class TestNoDataOrZeros:
    def test_no_update(self) -> None:
        x, gy = batch(6, 7, 5, 0)
        assert torch.equal(blockwise(x, gy, 4).block_scores(4), torch.zeros(2, 2, dtype=torch.float64))

    @pytest.mark.parametrize("zero", ["inputs", "gradients", "both"])
    @pytest.mark.parametrize("damping", [None, 0.0])
    def test_zeros(self, zero: str, damping: float | None) -> None:
        x, gy = batch(6, 7, 5, 0)
        estimator = blockwise(x, gy, 4, damping)
        estimator.update(x * (zero == "gradients"), gy * (zero == "inputs"))
        assert torch.equal(estimator.block_scores(4), torch.zeros(2, 2, dtype=torch.float64))

    def test_a_block_of_dead_outputs_beside_live_ones(self) -> None:
        x, gy = batch(8, 8, 50, 0)
        gy[:, 4:] = 0.0
        estimator = blockwise(x, gy, 4)
        estimator.update(x, gy)
        scores = estimator.block_scores(4)
        assert bool((scores[0] > 0).all())
        assert torch.equal(scores[1], torch.zeros(2, dtype=torch.float64))


def test_memory_is_that_of_the_diagonal_blocks() -> None:
    meta = torch.device("meta")
    assert [t.shape for t in BlockFactor(100, torch.float32, meta, block_size=16).state()] == [(7, 16, 16)]


def test_a_copy_is_independent() -> None:
    factor = BlockFactor(7, torch.float64, torch.device("cpu"), block_size=4)
    factor.update(torch.ones(3, 7))
    twin = factor.copy()
    twin.update(torch.ones(1, 7))
    assert float(factor.blocks[0, 0, 0]) == 3
    assert float(twin.blocks[0, 0, 0]) == 4


def test_products_and_inverses_of_diagonal_blocks_are_refused() -> None:
    covariance = BlockFactor(7, torch.float64, torch.device("cpu"), block_size=4).mean(torch.tensor(1.0))
    for wrong in (lambda: covariance.matmul(torch.ones(7, 1)), lambda: covariance.inverse_diagonal(0.1)):
        with pytest.raises(NotImplementedError, match="whole factors"):
            wrong()


def test_scores_of_a_weight_stored_transposed_are_the_transposed_scores() -> None:
    # The tracer hands in (inputs, gradients) whatever the storage; swapping the two must transpose the scores.
    x, gy = batch(6, 7, 50, 0)
    alive = (gy != 0).any(1)
    x, gy = x[alive], gy[alive]
    straight, swapped = blockwise(x, gy, 4), blockwise(gy, x, 4)
    straight.update(x, gy)
    swapped.update(gy, x)
    torch.testing.assert_close(swapped.block_scores(4), straight.block_scores(4).t())
