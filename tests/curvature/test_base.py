from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sylva_compile.curvature import base
from sylva_compile.curvature.base import Curvature, live_tokens, sum_lines, sum_tiles
from sylva_compile.curvature.baselines import SquaredGradient
from sylva_compile.curvature.blockwise import BlockKfac
from sylva_compile.curvature.kfac import DenseKfac

sizes = st.integers(1, 20)


@given(m=sizes, n=sizes, b=st.integers(1, 24), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_sums_of_blocks_and_of_lines_are_those_of_a_loop(m: int, n: int, b: int, seed: int) -> None:
    matrix = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tiles = sum_tiles(matrix, b)
    assert tiles.shape == (-(-m // b), -(-n // b))
    for r in range(tiles.shape[0]):
        for c in range(tiles.shape[1]):
            torch.testing.assert_close(tiles[r, c], matrix[r * b : (r + 1) * b, c * b : (c + 1) * b].sum())
    for axis in (0, 1):
        expected = torch.stack([part.sum(axis) for part in matrix.split(b, dim=axis)], dim=axis)
        torch.testing.assert_close(sum_lines(matrix, b, axis), expected)


def test_live_tokens_are_those_with_any_output_gradient() -> None:
    gradients = torch.tensor([[0.0, 0.0], [0.0, 1e-30], [-0.0, 0.0], [1.0, -1.0]])
    assert live_tokens(gradients).tolist() == [[0.0], [1.0], [0.0], [1.0]]


def estimators() -> list[Curvature]:
    weight = torch.zeros(6, 7)
    return [
        DenseKfac(weight, 6, 7, score="gain", damping=None),
        DenseKfac(weight, 6, 7, score="paper", damping=None),
        BlockKfac(weight, 6, 7, block_size=4, damping=None),
        SquaredGradient(weight, 6, 7),
    ]


@pytest.mark.parametrize("index", range(4))
class TestCombine:
    def test_sums_of_two_ranks_give_the_scores_of_all_the_data(
        self, index: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine, theirs, together = (estimators()[index] for _ in range(3))
        for seed, estimator in enumerate((mine, theirs)):
            generator = torch.Generator().manual_seed(seed)
            batch = torch.randn(9, 7, generator=generator), torch.randn(9, 6, generator=generator)
            estimator.update(*batch)
            together.update(*batch)
        others = iter(theirs.sums())

        def all_reduce(total: Tensor, group: Any) -> None:
            total += next(others)

        monkeypatch.setattr(base, "all_reduce", all_reduce)
        mine.combine(None)  # type: ignore[arg-type]
        assert next(others, None) is None
        torch.testing.assert_close(mine.block_scores(4), together.block_scores(4), rtol=1e-5, atol=1e-9)

    def test_shapes_of_sums_do_not_depend_on_the_data(self, index: int) -> None:
        estimator = estimators()[index]
        before = [(total.shape, total.dtype) for total in estimator.sums()]
        estimator.update(torch.randn(3, 7), torch.randn(3, 6))
        assert [(total.shape, total.dtype) for total in estimator.sums()] == before
