"""Online hierarchies against dense sums, and against the best hierarchy of their rank on real activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sylva_compile.curvature import online
from sylva_compile.curvature.hierarchy import Hierarchy
from sylva_compile.curvature.online import OnlineHierarchy, update_together

F64 = torch.float64


def tokens_of(count: int, size: int, seed: int, *batch: int) -> Tensor:
    return torch.randn(*batch, count, size, dtype=F64, generator=torch.Generator().manual_seed(seed))


def dense(tree: OnlineHierarchy) -> Tensor:
    return tree.hierarchy().dense()


class TestExactAtFullRank:
    @given(
        st.integers(1, 60), st.integers(0, 4), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 99)
    )
    @settings(deadline=None, max_examples=30)
    def test_any_batches(self, size: int, depth: int, counts: list[int], seed: int) -> None:
        batches = [tokens_of(count, size, seed + at) for at, count in enumerate(counts)]
        tree = OnlineHierarchy(size, depth, size, dtype=F64)
        for tokens in batches:
            tree.update(tokens)
        whole = torch.cat(batches)
        torch.testing.assert_close(dense(tree), whole.mT @ whole, rtol=1e-8, atol=1e-8)

    @given(st.integers(16, 60), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
    @settings(deadline=None, max_examples=20)
    def test_as_long_as_the_rank_holds_all_tokens(self, size: int, depth: int, count: int, seed: int) -> None:
        tree = OnlineHierarchy(size, depth, 4, dtype=F64)
        whole = tokens_of(count, size, seed)
        for token in whole:
            tree.update(token[None])
        torch.testing.assert_close(dense(tree), whole.mT @ whole, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("limit", [0, online.WHOLE_BLOCKS])
    def test_wide_and_thin_products_agree(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(online, "WHOLE_BLOCKS", limit)
        whole = tokens_of(3, 50, 0)
        whole = tokens_of(40, 3, 1) @ whole
        tree = OnlineHierarchy(50, 2, 3, dtype=F64)
        for tokens in whole.split(13):
            tree.update(tokens)
        torch.testing.assert_close(dense(tree), whole.mT @ whole, rtol=1e-8, atol=1e-8)


class TestOddData:
    def test_no_tokens_and_zeros_change_nothing(self) -> None:
        tree = OnlineHierarchy(21, 2, 3, dtype=F64)
        tree.update(torch.zeros(0, 21, dtype=F64))
        tree.update(torch.zeros(5, 21, dtype=F64))
        torch.testing.assert_close(dense(tree), torch.zeros(21, 21, dtype=F64), rtol=0, atol=0)

    def test_zero_residuals_and_repeated_tokens(self) -> None:
        token = tokens_of(1, 21, 0)
        tree = OnlineHierarchy(21, 2, 2, dtype=F64)
        for _ in range(5):
            tree.update(token.expand(3, -1))
        torch.testing.assert_close(dense(tree), 15 * token.mT @ token, rtol=1e-8, atol=1e-8)

    def test_tokens_that_are_zero_in_one_half(self) -> None:
        tokens = tokens_of(9, 20, 0)
        tokens[:, 10:] = 0
        tree = OnlineHierarchy(20, 1, 2, dtype=F64)
        tree.update(tokens)
        torch.testing.assert_close(dense(tree), tokens.mT @ tokens, rtol=1e-8, atol=1e-8)

    def test_directions_that_come_late_are_found(self) -> None:
        first, second = tokens_of(200, 64, 0), 10 * tokens_of(2, 64, 1)
        first[:, :8] = first[:, 32:40] = 0
        second[:, 8:32] = second[:, 40:] = 0
        tree = OnlineHierarchy(64, 1, 2, dtype=F64)
        for tokens in (*first.split(50), second.repeat(50, 1)):
            tree.update(tokens)
        best = Hierarchy.from_dense(first.mT @ first + 50 * second.mT @ second, 1, 2)
        torch.testing.assert_close(tree.hierarchy().values[0], best.values[0], rtol=0.05, atol=0)

    def test_empty_slots_stay_empty(self) -> None:
        tree = OnlineHierarchy(13, 3, 2, dtype=F64)
        tree.update(tokens_of(1, 13, 0))
        real = tree.layout.spread(torch.ones(13, dtype=F64), 0)
        for basis in tree.hierarchy().bases:
            assert not bool(basis.flatten(-4, -2)[real == 0].any())


class TestManyFactors:
    @given(
        st.integers(2, 60),
        st.integers(0, 3),
        st.integers(1, 8),
        st.integers(1, 5),
        st.integers(1, 40),
        st.integers(0, 99),
    )
    @settings(deadline=None, max_examples=30)
    def test_one_call_for_several_factors_equals_a_call_for_each(
        self, size: int, depth: int, rank: int, count: int, tokens: int, seed: int
    ) -> None:
        together, alone = ([OnlineHierarchy(size, depth, rank, dtype=F64) for _ in range(count)] for _ in range(2))
        for batch in range(3):
            data = [tokens_of(tokens, size, seed + 10 * batch + at) for at in range(count)]
            update_together(together, [tree.layout.spread(one, 1) for tree, one in zip(together, data, strict=True)])
            for tree, one in zip(alone, data, strict=True):
                tree.update(one)
        for found, expected in zip(together, alone, strict=True):
            assert found.updates == expected.updates
            torch.testing.assert_close(dense(found), dense(expected), rtol=1e-8, atol=1e-8)

    def test_in_float32_several_factors_are_as_good_as_each_alone(self) -> None:
        """Against dense sums in float64, at a rank that holds all tokens, of sizes with thin and with whole nodes."""
        size = 4 * online.WHOLE_BLOCKS
        trees = [OnlineHierarchy(size, 3, 16) for _ in range(3)]
        data = [tokens_of(8, size, at) for at in range(6)]
        for batch in (data[:3], data[3:]):
            update_together(trees, [tokens.float() for tokens in batch])
        for tree, first, second in zip(trees, data[:3], data[3:], strict=True):
            exact = first.mT @ first + second.mT @ second
            assert float((dense(tree) - exact).norm() / exact.norm()) < 1e-6

    def test_merge_adds_up(self) -> None:
        parts = [tokens_of(2, 33, seed) for seed in range(3)]
        trees = [OnlineHierarchy(33, 2, 6, dtype=F64) for _ in parts]
        for tree, tokens in zip(trees, parts, strict=True):
            tree.update(tokens)
        trees[0].merge(*trees[1:])
        whole = torch.cat(parts)
        torch.testing.assert_close(dense(trees[0]), whole.mT @ whole, rtol=1e-8, atol=1e-8)

    def test_a_copy_is_independent_and_goes_on_alike(self) -> None:
        tree = OnlineHierarchy(33, 2, 2)
        tree.update(tokens_of(20, 33, 0))
        twin = tree.copy()
        for one in (tree, twin):
            one.update(tokens_of(20, 33, 1))
        for mine, other in zip(tree.state(), twin.state(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
        twin.update(tokens_of(20, 33, 2))
        assert not torch.equal(tree.leaves, twin.leaves)

    def test_bytes_count_leaves_and_bases_of_twice_the_rank(self) -> None:
        # 8 leaves of 13 slots; each of three levels keeps U and V of 104 / 2 slots in all, and Λ of every node.
        numbers = 8 * 13 * 13 + 3 * 8 * 104 + 8 * (1 + 2 + 4)
        assert OnlineHierarchy(100, 3, 4).nbytes == 4 * numbers + 8
        assert OnlineHierarchy(100, 3, 4, device="meta").nbytes == 4 * numbers + 8


def off_diagonal_errors(exact: Tensor, approximate: Tensor, depth: int, rank: int) -> list[float]:
    """Return for each level the largest ratio of a node's error to the least error at that rank (Frobenius)."""
    worst = []
    for level in range(depth):
        edges = [node * exact.shape[0] // 2 ** (level + 1) for node in range(2 ** (level + 1) + 1)]
        ratios = []
        for node in range(2**level):
            rows, cols = slice(*edges[2 * node : 2 * node + 2]), slice(*edges[2 * node + 1 : 2 * node + 3])
            best = torch.linalg.svdvals(exact[rows, cols])[rank:].norm()
            ratios.append(float((exact - approximate)[rows, cols].norm() / best))
        worst.append(max(ratios))
    return worst


def reference_scheme(batches: list[Tensor], depth: int) -> Tensor:
    """Return the reference implementation's estimate: rank 1, one mean token per batch, scaled to its tokens."""
    tree = OnlineHierarchy(batches[0].shape[1], depth, 1, kept=1, probes=1, dtype=F64)
    for tokens in batches:
        tree.update(tokens.mean(0, keepdim=True) * tokens.shape[0] ** 0.5)
    return dense(tree)


class TestRealActivations:
    @pytest.mark.parametrize("weight", ["0.attention.self.query", "2.intermediate.dense", "5.attention.output.dense"])
    @pytest.mark.parametrize("side", ["inputs", "output gradients"])
    def test_error_is_within_a_tenth_of_the_best(
        self,
        weight: str,
        side: str,
        minilm: dict[str, dict[str, list[Tensor]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        batches = minilm[weight][side]
        size, depth, rank = batches[0].shape[1], 4, 8
        exact = sum((tokens.to(F64).mT @ tokens.to(F64) for tokens in batches), torch.zeros(size, size, dtype=F64))
        tree = OnlineHierarchy(size, depth, rank)
        paper = OnlineHierarchy(size, depth, rank, kept=rank)
        for tokens in batches:
            tree.update(tokens)
            paper.update(tokens)
        errors = off_diagonal_errors(exact, dense(tree).to(F64), depth, rank)
        cut = off_diagonal_errors(exact, dense(paper).to(F64), depth, rank)
        reference = off_diagonal_errors(exact, reference_scheme(batches, depth), depth, rank)
        with capsys.disabled():
            print(f"\n{weight}, {side} [{size}]: error / best of rank {rank}, worst node of each level:")
            for name, row in (("kept 2r", errors), ("cut each batch", cut), ("rank-1 token mean", reference)):
                print(f"  {name:18s}" + " ".join(f"{value:8.3f}" for value in row))
        assert max(errors) <= 1.1
