"""Hierarchical matrices against dense ones in float64."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.hierarchy import Hierarchy
from sylva_compile.curvature.importance import diagonal_blocks
from sylva_compile.curvature.online import OnlineHierarchy
from sylva_compile.curvature.tree_layout import TreeLayout

EXACT = {"rtol": 1e-8, "atol": 1e-8}
sizes = st.integers(1, 70)
depths = st.integers(0, 4)
seeds = st.integers(0, 2**31)


def covariance(size: int, seed: int, tokens: int | None = None, batch: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*batch, tokens or 2 * size, size, dtype=torch.float64, generator=generator)
    return z.mT @ z / z.shape[-2]


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return matrix + damping * mean[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


class TestLayout:
    @given(sizes, depths)
    @settings(deadline=None)
    def test_every_row_has_a_slot_and_nodes_of_a_level_differ_by_one_row(self, size: int, depth: int) -> None:
        layout = TreeLayout(size, depth)
        index = layout.index(torch.device("cpu"))
        assert index.unique().numel() == size
        assert bool((index.diff() > 0).all())
        for level in range(depth + 1):
            sizes = torch.bincount(index // (layout.slots >> level), minlength=2**level)
            assert int(sizes.max() - sizes.min()) <= 1

    def test_spread_and_gather_are_inverse(self) -> None:
        layout, tokens = TreeLayout(13, 2), torch.randn(3, 13)
        spread = layout.spread(tokens, 1)
        assert spread.shape == (3, 16)
        torch.testing.assert_close(layout.gather(spread, 1), tokens, rtol=0, atol=0)


class TestExactAtFullRank:
    @given(sizes, depths, seeds)
    @settings(deadline=None, max_examples=30)
    def test_products_and_inverses(self, size: int, depth: int, seed: int) -> None:
        matrix = covariance(size, seed)
        tree = Hierarchy.from_dense(matrix, depth, size)
        right = torch.randn(size, 3, dtype=torch.float64)
        whole = damped(matrix, 1e-2)
        torch.testing.assert_close(tree.dense(), matrix, **EXACT)
        torch.testing.assert_close(tree.matmul(right), matrix @ right, **EXACT)
        torch.testing.assert_close(tree.solve(right, 1e-2), torch.linalg.solve(whole, right), **EXACT)
        torch.testing.assert_close(tree.inverse_diagonal(1e-2), torch.linalg.inv(whole).diagonal(), **EXACT)

    @given(sizes, depths, st.integers(1, 20), seeds)
    @settings(deadline=None, max_examples=30)
    def test_diagonal_blocks_may_cross_leaves(self, size: int, depth: int, block: int, seed: int) -> None:
        matrix = covariance(size, seed)
        tree = Hierarchy.from_dense(matrix, depth, size)
        torch.testing.assert_close(tree.diagonal_blocks(block), diagonal_blocks(matrix, block), **EXACT)

    def test_several_factors_at_once(self) -> None:
        matrix = covariance(37, 0, batch=(2, 3))
        tree = Hierarchy.from_dense(matrix, 3, 37)
        inverse = torch.linalg.inv(damped(matrix, 1e-2))
        torch.testing.assert_close(tree.dense(), matrix, **EXACT)
        torch.testing.assert_close(tree.inverse_diagonal(1e-2), inverse.diagonal(dim1=-2, dim2=-1), **EXACT)
        torch.testing.assert_close(tree.diagonal_blocks(8)[1, 2], diagonal_blocks(matrix[1, 2], 8), **EXACT)

    def test_zero_singular_values_are_safe(self) -> None:
        matrix = torch.diag(torch.arange(1.0, 14.0, dtype=torch.float64))
        tree = Hierarchy.from_dense(matrix, 2, 4)
        torch.testing.assert_close(tree.inverse_diagonal(1e-3), damped(matrix, 1e-3).diagonal().reciprocal(), **EXACT)


class TestAtLowRank:
    @given(st.integers(8, 60), st.integers(1, 3), st.integers(1, 4), seeds)
    @settings(deadline=None, max_examples=20)
    def test_is_symmetric_and_its_inverse_is_the_dense_one(self, size: int, depth: int, rank: int, seed: int) -> None:
        tree = Hierarchy.from_dense(covariance(size, seed), depth, rank)
        dense = tree.dense()
        torch.testing.assert_close(dense, dense.mT, rtol=0, atol=1e-12)
        inverse = tree.inverse(1e-2, indefinite="raise")
        whole = dense + inverse.damping * torch.eye(size, dtype=torch.float64)
        assert float(torch.linalg.eigvalsh(whole)[0]) > 0
        expected = torch.linalg.inv(whole)
        scale = float(expected.abs().max())
        unit = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(inverse.solve(unit), expected, rtol=1e-7, atol=1e-7 * scale)
        torch.testing.assert_close(inverse.diagonal(), expected.diagonal(), rtol=1e-7, atol=1e-7 * scale)

    @given(st.integers(8, 60), st.integers(1, 3), st.integers(1, 4), seeds)
    @settings(deadline=None, max_examples=20)
    def test_limited_inverse_is_symmetric_positive_definite(self, size: int, depth: int, rank: int, seed: int) -> None:
        inverse = Hierarchy.from_dense(covariance(size, seed), depth, rank).inverse(1e-2)
        dense = inverse.solve(torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(dense, dense.mT, rtol=1e-8, atol=1e-8 * float(dense.abs().max()))
        assert float(torch.linalg.eigvalsh(dense)[0]) > 0
        torch.testing.assert_close(inverse.diagonal(), dense.diagonal(), **EXACT)


def broken_by_truncation() -> Hierarchy:
    """Return the rank-1 hierarchy, indefinite, of a positive semidefinite matrix of large correlations."""
    for seed in range(100):
        tree = Hierarchy.from_dense(covariance(32, seed, tokens=5), 2, 1)
        if float(torch.linalg.eigvalsh(tree.dense())[0]) < -1e-2:
            return tree
    raise AssertionError("no such matrix")


class TestIndefinite:
    def test_raises_damping_and_logs_once(self, caplog: pytest.LogCaptureFixture) -> None:
        tree = broken_by_truncation()
        with caplog.at_level(logging.INFO):
            inverse = tree.inverse(1e-3, indefinite="raise")
        assert len(caplog.records) == 1
        raised = float(inverse.damping / tree.mean_diagonal() / 1e-3)
        assert raised in (pytest.approx(10), pytest.approx(100), pytest.approx(1000), pytest.approx(10000))
        assert bool((inverse.diagonal() > 0).all())

    def test_limits_correlations_and_logs_once(self, caplog: pytest.LogCaptureFixture) -> None:
        tree = broken_by_truncation()
        with caplog.at_level(logging.INFO):
            inverse = tree.inverse(1e-3)
        assert len(caplog.records) == 1
        assert bool(inverse.limited)
        torch.testing.assert_close(inverse.damping, 1e-3 * tree.mean_diagonal())

    def test_only_the_factor_that_fails_is_changed(self) -> None:
        bad = broken_by_truncation().dense()
        tree = Hierarchy.from_dense(torch.stack([torch.eye(32, dtype=torch.float64), bad]), 2, 1)
        inverse = tree.inverse(1e-3, indefinite="raise")
        assert float(inverse.damping[0]) == pytest.approx(1e-3)
        assert float(inverse.damping[1]) > 5e-3 * float(tree.mean_diagonal()[1])
        assert tree.inverse(1e-3).limited.tolist() == [False, True]

    def test_a_leaf_that_is_not_positive_definite_raises_damping(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        matrix = torch.eye(8, dtype=torch.float64)
        matrix[0, 1] = matrix[1, 0] = 1.05
        inverse = Hierarchy.from_dense(matrix, 2, 2).inverse(1e-3)
        assert float(inverse.damping) == pytest.approx(0.1)
        assert len(caplog.records) == 1

    def test_a_positive_definite_factor_logs_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        Hierarchy.from_dense(covariance(20, 0), 2, 20).inverse_diagonal(1e-3)
        assert not caplog.records

    def test_values_that_are_not_finite_are_an_error(self) -> None:
        matrix = torch.eye(8, dtype=torch.float64)
        matrix[0, 0] = torch.nan
        tree = Hierarchy(TreeLayout(8, 0), matrix[None], [], [])
        with pytest.raises(ArithmeticError, match="finite"):
            tree.inverse_diagonal(1e-3)


def test_llama_7b_factors_take_a_fifth_of_dense_kfac_at_most() -> None:
    hidden, mlp, layers = 4096, 11008, 32
    meta = torch.device("meta")

    def dense(size: int) -> int:
        return DenseFactor(size, torch.float32, meta).nbytes

    exact = layers * (11 * dense(hidden) + 3 * dense(mlp))
    assert exact / 2**30 == pytest.approx(65.4, abs=0.5)
    # A of q, k, v; of o; of gate and up; of down. G of q, k, v, o and down; of gate and up.
    shared = {hidden: 3 + 5, mlp: 1 + 2}
    tree = layers * sum(count * OnlineHierarchy(size, 4, 8, device=meta).nbytes for size, count in shared.items())
    print(f"LLaMA-7B factors: dense {exact / 2**30:.1f} GiB, hierarchical {tree / 2**30:.2f} GiB while tracing")
    assert tree <= exact / 5
