from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from specs import spec
from torch import Tensor

from sylva_compile.curvature.base import live_tokens, sum_groups, sum_tiles
from sylva_compile.curvature.baselines import SquaredGradient

sizes = st.integers(1, 20)


@given(m=sizes, n=sizes, b=st.integers(1, 24), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_sums_of_blocks_and_of_groups_equal_a_loop(m: int, n: int, b: int, seed: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tiles = sum_tiles(matrix, b)
    assert tiles.shape == (-(-m // b), -(-n // b))
    for r in range(tiles.shape[0]):
        for c in range(tiles.shape[1]):
            torch.testing.assert_close(tiles[r, c], matrix[r * b : (r + 1) * b, c * b : (c + 1) * b].sum())
    for axis in (0, 1):
        expected = torch.stack([part.sum(axis) for part in matrix.split(b, dim=axis)], dim=axis)
        torch.testing.assert_close(sum_groups(matrix, b, axis), expected)


def test_live_tokens_are_those_with_an_output_gradient() -> None:
    gradients = torch.tensor([[0.0, 0.0], [0.0, 1e-4], [-0.0, 0.0], [1.0, -1.0]])
    assert live_tokens(gradients).tolist() == [False, True, False, True]
    assert live_tokens(1e-30 * gradients).tolist() == [False, True, False, True]


def test_rounding_errors_do_not_make_a_token_live() -> None:
    gradients = torch.tensor([[3e-8, -1e-9], [0.0, -1.0]])
    assert live_tokens(gradients).tolist() == [False, True]


def test_no_gradient_at_all() -> None:
    assert live_tokens(torch.zeros(2, 3)).tolist() == [False, False]
    assert live_tokens(torch.zeros(0, 3)).tolist() == []


def test_sums_of_two_ranks_give_the_scores_of_all_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs, together = (SquaredGradient(spec(6, 7)) for _ in range(3))
    for seed, estimator in enumerate((mine, theirs)):
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(9, 7, generator=generator), torch.randn(9, 6, generator=generator)
        estimator.update(*batch)
        together.update(*batch)
    others = iter(theirs.state())

    def all_reduce(total: Tensor, group: Any) -> None:
        total += next(others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    mine.combine(None)  # type: ignore[arg-type]
    torch.testing.assert_close(mine.block_scores(4), together.block_scores(4), rtol=1e-5, atol=1e-9)
