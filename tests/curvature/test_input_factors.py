"""Shared input factors against a separate factor for each weight."""

import pytest
import torch
from torch import Tensor

from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.errors import TraceError

F64 = torch.float64


def batch_of(tokens: int, n: int, seed: int) -> Tensor:
    return torch.randn(tokens, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.5


def dense_factor(factors: InputFactors, reader: str) -> Tensor:
    return factors.factor(reader).state()[0]


def new_factors(*readers: str, size: int = 12) -> InputFactors:
    factors = InputFactors(DenseFactor)
    for reader in readers:
        factors.register(reader, size, F64, torch.device("cpu"))
    return factors


class TestInputFactors:
    all_live = torch.ones(7, dtype=torch.bool)

    def test_the_same_inputs_are_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        updates: list[int] = []
        update = DenseFactor.update
        monkeypatch.setattr(DenseFactor, "update", lambda self, z: (updates.append(1), update(self, z))[1])
        factors = new_factors("q", "k", "v")
        total = torch.zeros(12, 12, dtype=F64)
        for seed in range(3):
            x = batch_of(7, 12, seed)
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
            x = batch_of(7, 12, seed)
            factors.show("q", x, self.all_live)
            assert factors._shown
            factors.show("k", x, self.all_live)
            assert bool(factors._shown) == (seed == 0)
            factors.end_batch()

    def test_other_live_tokens_or_another_tensor_end_the_sharing(self) -> None:
        factors = new_factors("q", "k", "o")
        x = batch_of(7, 12, 0)
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

    def test_a_reader_missing_from_a_batch_ends_the_sharing(self) -> None:
        factors = new_factors("q", "k")
        x = batch_of(7, 12, 0)
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
        x = batch_of(7, 12, 0)
        for _ in range(2):
            for reader in ("tied", "tied", "other"):
                factors.show(reader, x, self.all_live)
            factors.end_batch()
        torch.testing.assert_close(dense_factor(factors, "tied"), 4 * x.mT @ x)
        torch.testing.assert_close(dense_factor(factors, "other"), 2 * x.mT @ x)

    def test_inputs_overwritten_while_held_are_refused(self) -> None:
        factors = new_factors("q")
        x = batch_of(7, 12, 0)
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

    def test_readers_that_have_shown_nothing_are_in_no_group(self) -> None:
        factors = new_factors("q", "k", "idle")
        x = batch_of(7, 12, 0)
        for reader in ("q", "k"):
            factors.show(reader, x, self.all_live)
        assert factors.groups() == [["q", "k"]]

    def test_regrouped_factors_start_from_zero_and_share_on(self) -> None:
        factors = new_factors("q", "k", "o")
        factors.regroup([["q", "k"]])
        assert factors.factor("q") is factors.factor("k")
        assert not bool(dense_factor(factors, "q").any())
        x = batch_of(7, 12, 0)
        for reader in ("q", "k", "o"):
            factors.show(reader, x, self.all_live)
        factors.end_batch()
        assert factors.groups() == [["q", "k"], ["o"]]
