"""Hierarchical K-FAC against dense K-FAC, and shared input factors against factors of one's own."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import destroy_process_group, group, init_process_group
from torch.multiprocessing import spawn

import sylva_compile
from sylva_compile.curvature.hodlr_kfac import HierarchicalKfac
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import DenseKfac
from sylva_compile.curvature.online import OnlineHierarchy
from sylva_compile.errors import TraceError

F64 = torch.float64


def batch_of(tokens: int, m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, dtype=F64, generator=generator) + 0.5
    gy = torch.randn(tokens, m, dtype=F64, generator=generator)
    gy[::3] = 0
    return x, gy


def estimators(m: int, n: int, score: str, depth: int = 2, rank: int = 64) -> tuple[HierarchicalKfac, DenseKfac]:
    weight = torch.empty(m, n, dtype=F64)
    tree = HierarchicalKfac(weight, m, n, depth=depth, rank=rank, score=score, damping=None)
    return tree, DenseKfac(weight, m, n, score=score, damping=None)


class TestScores:
    @given(
        st.integers(9, 50),
        st.integers(9, 50),
        st.integers(0, 3),
        st.sampled_from(["gain", "paper"]),
        st.integers(0, 99),
    )
    @settings(deadline=None, max_examples=20)
    def test_equal_dense_ones_at_full_rank(self, m: int, n: int, depth: int, score: str, seed: int) -> None:
        tree, dense = estimators(m, n, score, depth)
        for at, tokens in enumerate((1, 40, 25)):
            for one in (tree, dense):
                one.update(*batch_of(tokens, m, n, seed + at))
        found, expected = tree.block_scores(8), dense.block_scores(8)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))

    @pytest.mark.parametrize("score", ["gain", "paper"])
    def test_no_live_token_gives_scores_of_zero(self, score: str) -> None:
        tree, _ = estimators(20, 12, score)
        tree.update(torch.ones(4, 12, dtype=F64), torch.zeros(4, 20, dtype=F64))
        assert not bool(tree.block_scores(8).any())

    @pytest.mark.parametrize("score", ["gain", "paper"])
    def test_at_low_rank_scores_are_finite_and_agree_roughly(self, score: str) -> None:
        tree, dense = estimators(96, 64, score, depth=2, rank=4)
        for one in (tree, dense):
            one.update(*batch_of(300, 96, 64, 0))
        found, expected = tree.block_scores(16), dense.block_scores(16)
        assert bool(found.isfinite().all())
        assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.8

    def test_the_gradient_may_live_elsewhere_and_half_precision_is_widened(self) -> None:
        weight = torch.empty(10, 12, dtype=torch.bfloat16)
        elsewhere = torch.device("cpu")
        tree = HierarchicalKfac(weight, 10, 12, depth=1, rank=2, score="gain", damping=None, gradient_device=elsewhere)
        x, gy = batch_of(8, 10, 12, 0)
        tree.update(x.bfloat16(), gy.bfloat16())
        assert tree.gradient.dtype == torch.float32
        assert tree.g.leaves.dtype == torch.float32


def dense_factor(factors: InputFactors, reader: str) -> Tensor:
    return factors.factor(reader).hierarchy().dense()


def new_factors(*readers: str, size: int = 12) -> InputFactors:
    factors = InputFactors(depth=1, rank=size)
    for reader in readers:
        factors.register(reader, size, F64, torch.device("cpu"))
    return factors


class TestInputFactors:
    all_live = torch.ones(7, dtype=torch.bool)

    def test_the_same_inputs_are_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        updates: list[int] = []
        update = OnlineHierarchy.update
        monkeypatch.setattr(OnlineHierarchy, "update", lambda self, z: (updates.append(1), update(self, z))[1])
        factors = new_factors("q", "k", "v")
        total = torch.zeros(12, 12, dtype=F64)
        for seed in range(3):
            x, _ = batch_of(7, 1, 12, seed)
            for reader in ("q", "k", "v"):
                factors.show(reader, x.view(7, 12).detach(), self.all_live)
            factors.end_batch()
            total += x.mT @ x
        assert factors.groups() == [["q", "k", "v"]]
        assert len(updates) == 3
        torch.testing.assert_close(dense_factor(factors, "k"), total)

    def test_a_known_group_is_updated_when_its_last_reader_comes(self) -> None:
        factors = new_factors("q", "k")
        for seed in range(2):
            x, _ = batch_of(7, 1, 12, seed)
            factors.show("q", x, self.all_live)
            assert factors._shown
            factors.show("k", x, self.all_live)
            assert bool(factors._shown) == (seed == 0)
            factors.end_batch()

    def test_other_live_tokens_or_another_tensor_part_the_ways(self) -> None:
        factors = new_factors("q", "k", "o")
        x, _ = batch_of(7, 1, 12, 0)
        for reader in ("q", "k", "o"):
            factors.show(reader, x, self.all_live)
        factors.end_batch()
        live = self.all_live.clone()
        live[0] = False
        factors.show("q", x, live)
        factors.show("k", x, self.all_live)
        factors.show("o", x.clone(), self.all_live)
        factors.end_batch()
        assert factors.groups() == [["q"], ["k"], ["o"]]
        torch.testing.assert_close(dense_factor(factors, "q"), x.mT @ x + x[1:].mT @ x[1:])
        torch.testing.assert_close(dense_factor(factors, "k"), 2 * x.mT @ x)
        torch.testing.assert_close(dense_factor(factors, "o"), 2 * x.mT @ x)

    def test_a_reader_missing_from_a_batch_parts_the_ways(self) -> None:
        factors = new_factors("q", "k")
        x, _ = batch_of(7, 1, 12, 0)
        for readers in (("q", "k"), ("q",)):
            for reader in readers:
                factors.show(reader, x, self.all_live)
            factors.end_batch()
        torch.testing.assert_close(dense_factor(factors, "q"), 2 * x.mT @ x)
        torch.testing.assert_close(dense_factor(factors, "k"), x.mT @ x)

    def test_freed_memory_is_never_taken_for_the_same_inputs(self) -> None:
        factors = new_factors("first", "second")
        total = torch.zeros(12, 12, dtype=F64)
        for reader in ("first", "second"):
            # The caller lets go of each tensor at once; its memory is likely to be the next one's.
            factors.show(reader, torch.full((7, 12), float(len(reader)), dtype=F64), self.all_live)
        factors.end_batch()
        assert factors.groups() == [["first"], ["second"]]
        for reader in ("first", "second"):
            total.fill_(7.0 * len(reader) ** 2)
            torch.testing.assert_close(dense_factor(factors, reader), total)

    def test_a_weight_that_reads_the_same_inputs_twice_counts_them_twice(self) -> None:
        factors = new_factors("tied", "other")
        x, _ = batch_of(7, 1, 12, 0)
        for _ in range(2):
            for reader in ("tied", "tied", "other"):
                factors.show(reader, x, self.all_live)
            factors.end_batch()
        torch.testing.assert_close(dense_factor(factors, "tied"), 4 * x.mT @ x)
        torch.testing.assert_close(dense_factor(factors, "other"), 2 * x.mT @ x)

    def test_inputs_overwritten_while_held_are_refused(self) -> None:
        factors = new_factors("q")
        x, _ = batch_of(7, 1, 12, 0)
        factors.show("q", x, self.all_live)
        x.zero_()
        with pytest.raises(TraceError, match="in-place"):
            factors.end_batch()

    def test_forgotten_factors_are_freed(self) -> None:
        factors = new_factors("q", "k")
        factors.factor("q")
        held = factors.nbytes
        factors.factor("k")
        assert factors.nbytes == 2 * held
        factors.forget("k")
        assert factors.nbytes == held


class Attention(nn.Module):
    """Three weights that read x, and one that reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, dtype=F64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).mT, -1)
        return self.o(scores @ self.v(x)).square().mean()


def run(model: nn.Module, batch: Tensor) -> Tensor:
    loss = model(batch)
    assert isinstance(loss, Tensor)
    return loss


class TestTracing:
    @pytest.mark.parametrize("partitions", [1, 2])
    def test_masks_equal_those_of_dense_kfac_at_full_rank(
        self, partitions: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        model, loader = Attention(), [torch.randn(4, 5, 32, dtype=F64) for _ in range(3)]
        groups: list[list[list[str]]] = []
        end_batch = InputFactors.end_batch

        def watch(self: InputFactors) -> None:
            end_batch(self)
            if len(self._factors) == 4:
                known = {id(f): [r for r, o in self._factors.items() if o is f] for f in self._factors.values()}
                groups.append(sorted(sorted(readers) for readers in known.values()))

        monkeypatch.setattr(InputFactors, "end_batch", watch)
        options = {"loss_fn": run, "block_size": 8, "sparsity": 0.5, "score": "paper", "progress": False}
        exact = sylva_compile.trace_and_mask(model, loader, method="kfac", **options)
        tree = sylva_compile.trace_and_mask(
            model, loader, method="sylva", rank=32, num_partitions=partitions, **options
        )
        assert dict(tree) == dict(exact)
        assert groups[2] == [["k.weight", "q.weight", "v.weight"], ["o.weight"]]


def _combine(rank: int, store: str, results: str) -> None:
    init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    factors = new_factors("q", "k")
    x, gy = batch_of(40, 10, 12, rank)
    weight = torch.empty(10, 12, dtype=F64)
    options = {"depth": 1, "rank": 12, "score": "paper", "damping": None, "shared": factors}
    readers = {name: HierarchicalKfac(weight, 10, 12, reader=name, **options) for name in ("q", "k")}
    for reader in readers.values():
        # Rank 1 sees different tensors, so that the ranks disagree about who shares.
        reader.update(x if rank == 0 else x.clone(), gy)
    factors.end_batch()
    factors.combine(group.WORLD)
    for reader in readers.values():
        reader.combine(group.WORLD)
    torch.save([reader.block_scores(8) for reader in readers.values()], f"{results}/{rank}.pt")
    destroy_process_group()


def test_ranks_combine_to_the_same_scores_as_one_process(tmp_path: Path) -> None:
    spawn(_combine, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    _, dense = estimators(10, 12, "paper")
    for rank in (0, 1):
        dense.update(*batch_of(40, 10, 12, rank))
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, dense.block_scores(8), rtol=1e-8, atol=1e-12)
