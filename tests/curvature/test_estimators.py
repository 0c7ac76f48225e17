"""Estimators of whole models: against dense K-FAC, over ranks, and from a saved state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from combine_two_ranks import batch_of, combine, estimators
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import specs_of
from torch import Tensor, nn
from torch.multiprocessing import spawn

import sylva_compile
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.errors import ArgumentError, TraceError

F64 = torch.float64
CHOICES = [
    ("sylva", "gain"),
    ("sylva", "greedy"),
    ("sylva", "paper"),
    ("kfac", "gain"),
    ("kfac", "paper"),
    ("fisher", "gain"),
]


class TestScores:
    @given(
        st.integers(9, 50),
        st.integers(9, 50),
        st.integers(0, 3),
        st.sampled_from(["gain", "greedy", "paper"]),
        st.integers(0, 99),
    )
    @settings(deadline=None, max_examples=20)
    def test_equal_dense_ones_at_full_rank(self, m: int, n: int, depth: int, score: str, seed: int) -> None:
        scores = []
        for method in ("sylva", "kfac"):
            one = estimators("w", m, n, method, score, depth=depth)
            for at, tokens in enumerate((1, 40, 25)):
                one.update("w", *batch_of(tokens, m, n, seed + at))
                one.end_batch()
            scores.append(one.take_scores("w"))
        found, expected = scores
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))

    @pytest.mark.parametrize(("method", "score"), CHOICES)
    def test_no_live_token_gives_scores_of_zero(self, method: str, score: str) -> None:
        one = estimators("w", 20, 12, method, score)
        one.update("w", torch.ones(4, 12, dtype=F64), torch.zeros(4, 20, dtype=F64))
        assert not bool(one.take_scores("w").any())

    @pytest.mark.parametrize(("method", "score"), [("sylva", "gain"), ("kfac", "greedy"), ("kfac", "paper")])
    def test_activations_whose_squares_overflow_are_an_error_that_names_the_weight(
        self, method: str, score: str
    ) -> None:
        one = estimators("w", 20, 12, method, score)
        inputs, gradients = batch_of(30, 20, 12, 0)
        one.update("w", 1e200 * inputs, gradients)
        one.end_batch()
        with pytest.raises(TraceError, match=r"^w: no scores .* leave it out of scope\.$"):
            one.take_scores("w")

    def test_at_low_rank_scores_are_finite_and_agree_roughly(self) -> None:
        scores = []
        for method in ("sylva", "kfac"):
            one = estimators("w", 96, 64, method, "paper", rank=4)
            one.update("w", *batch_of(300, 96, 64, 0))
            scores.append(one.take_scores("w").flatten())
        assert bool(scores[0].isfinite().all())
        assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.8

    def test_half_precision_is_widened(self) -> None:
        one = estimators("w", 10, 12, "sylva", "gain", dtype=torch.bfloat16)
        x, gy = batch_of(8, 10, 12, 0)
        one.update("w", x.bfloat16(), gy.bfloat16())
        assert {tensor.dtype for tensor in one.state().values()} == {torch.float32, F64}

    def test_a_transposed_weight_gives_transposed_scores(self) -> None:
        weights = {"linear": torch.empty(10, 20, dtype=F64), "conv1d": torch.empty(20, 10, dtype=F64)}
        one = Estimators(specs_of(weights, ["conv1d"]), SylvaConfig(score="gain", block_size=8, num_partitions=2))
        for name in weights:
            one.update(name, *batch_of(30, 10, 20, 0))
        assert torch.equal(one.take_scores("linear"), one.take_scores("conv1d").t())


class TestJointMap:
    @given(st.integers(9, 50), st.integers(9, 50), st.integers(0, 3), st.integers(0, 99))
    @settings(deadline=None, max_examples=20)
    def test_equals_that_of_dense_factors_at_full_rank(self, m: int, n: int, depth: int, seed: int) -> None:
        allowed = torch.rand(-(-m // 8), -(-n // 8), generator=torch.Generator().manual_seed(seed)) < 0.7
        count = int(allowed.sum()) // 2
        maps = []
        for method in ("sylva", "kfac"):
            one = estimators("w", m, n, method, "greedy", depth=depth)
            for at, tokens in enumerate((1, 40, 25)):
                one.update("w", *batch_of(tokens, m, n, seed + at))
                one.end_batch()
            maps.append(one.greedy_map("w", count, allowed))
        assert torch.equal(*maps)
        assert int(maps[0].sum()) == count

    def test_a_transposed_weight_gives_a_transposed_map(self) -> None:
        weights = {"linear": torch.empty(40, 20, dtype=F64), "conv1d": torch.empty(20, 40, dtype=F64)}
        one = Estimators(specs_of(weights, ["conv1d"]), SylvaConfig(block_size=8, num_partitions=2))
        for name in weights:
            one.update(name, *batch_of(30, 40, 20, 0))
        allowed = torch.ones(5, 3, dtype=torch.bool)
        allowed[0] = False
        maps = one.greedy_map("linear", 4, allowed), one.greedy_map("conv1d", 4, allowed.t())
        assert torch.equal(maps[0], maps[1].t())
        assert not bool(maps[0][0].any())

    def test_a_gain_that_is_not_finite_is_an_error_that_names_the_remedy(self) -> None:
        one = estimators("w", 16, 16, "kfac", "greedy")
        one.update("w", torch.ones(4, 16, dtype=F64), torch.full((4, 16), 1e200, dtype=F64))
        with pytest.raises(ArgumentError, match=r"^w: .*raise damping, or use score='gain'"):
            one.take_greedy_map("w", 1, torch.ones(2, 2, dtype=torch.bool))

    def test_taken_maps_free_their_statistics(self) -> None:
        one = estimators("qk", 20, 24, "sylva", "greedy")
        one.take_greedy_map("q", 2, torch.ones(3, 3, dtype=torch.bool))
        assert not any("/q/" in name for name in one.state())


class TestState:
    @pytest.mark.parametrize(("method", "score"), CHOICES)
    def test_loading_a_state_continues_the_sums(self, method: str, score: str) -> None:
        whole, first, second = (estimators("qko", 20, 24, method, score, rank=3) for _ in range(3))

        def show(one: Estimators, seed: int) -> None:
            x, gy = batch_of(30, 20, 24, seed)
            for name in "qk":
                one.update(name, x, gy)
            one.update("o", x.clone(), gy)
            one.end_batch()

        for seed in range(4):
            show(whole, seed)
        for seed in range(2):
            show(first, seed)
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        second.load_state(state.__getitem__, first.sharers())
        for seed in range(2, 4):
            show(second, seed)
        assert second.sharers() == whole.sharers() == ([] if method == "fisher" else [["q", "k"], ["o"]])
        for name in "qko":
            assert torch.equal(second.take_scores(name), whole.take_scores(name))

    def test_weights_not_seen_yet_may_still_share_afterwards(self) -> None:
        first, second = (estimators("qk", 20, 24, "sylva", "gain") for _ in range(2))
        second.load_state(first.state().__getitem__, first.sharers())
        x, gy = batch_of(30, 20, 24, 0)
        for name in "qk":
            second.update(name, x, gy)
        assert second.sharers() == [["q", "k"]]

    def test_taken_scores_free_their_statistics(self) -> None:
        one = estimators("qk", 20, 24, "sylva", "gain")
        one.take_scores("q")
        assert not any("/q/" in name for name in one.state())


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


@pytest.mark.parametrize(
    ("method", "score", "group_bytes"),
    [("sylva", "gain", 0), ("sylva", "paper", 0), ("sylva", "paper", 2**30), ("kfac", "paper", 0)],
)
def test_ranks_combine_to_the_same_scores_as_one_process(
    method: str, score: str, group_bytes: int, tmp_path: Path
) -> None:
    spawn(combine, (method, score, group_bytes, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = estimators("qe", 10, 12, "kfac", score)
    for rank in (0, 1):
        alone.update("q", *batch_of(40, 10, 12, rank))
        alone.end_batch()
    alone.update("e", *batch_of(40, 10, 12, 1))
    expected = {"q": alone.take_scores("q"), "e": alone.take_scores("e")}
    for name in "qke":
        assert torch.equal(first[name], second[name])
        wanted = expected["e" if name == "e" else "q"]
        torch.testing.assert_close(first[name], wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("method", "score"),
    [("sylva", "greedy"), ("sylva", "gain"), ("sylva", "paper"), ("kfac", "gain"), ("fisher", "gain")],
)
def test_an_autocast_around_the_trace_rounds_nothing(method: Any, score: Any, split: bool) -> None:
    found = []
    for enabled in (False, True):
        weights = {"w": torch.empty(2, 12, 20) if split else torch.empty(24, 20)}
        one = Estimators(specs_of(weights), SylvaConfig(method=method, score=score, block_size=8, num_partitions=1))
        x, gy = batch_of(40, 12 if split else 24, 20, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            one.update("w", x.float(), gy.float(), torch.tensor([30, 40], dtype=torch.int32) if split else None)
            one.end_batch()
            found.append(one.scores("w"))
    assert torch.equal(*found)
