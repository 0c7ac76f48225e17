"""Blocks, columns and rectangles by scores that a trace made once."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from quality_inputs import SCOPE, batch
from specs import specs_of
from torch import Tensor

import sylva_compile
from benchmarks.quality.tasks.classification import load_model
from benchmarks.quality.traces import Scores, block_scores, budget_elements, choose, choose_once
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.config import SylvaConfig
from sylva_compile.tracing.selection import ChooseBlocks


def scores_of(
    by_weight: dict[str, torch.Tensor], transposed: Sequence[str] = (), choose: ChooseBlocks | None = None
) -> Scores:
    return Scores(by_weight, specs_of(by_weight, transposed), 0.0, choose=choose)


class TestPatterns:
    def test_columns_are_whole_and_the_best(self) -> None:
        scores = scores_of({"a": torch.rand(6, 8), "b": torch.rand(8, 6)}, transposed=["b"])
        maps = choose(scores, SylvaConfig(sparsity=0.75), "columns")
        kept = maps["a"].any(0)
        assert int(kept.sum()) == 2
        assert bool(maps["a"][:, kept].all())
        assert scores.by_weight["a"].sum(0)[kept].min() >= scores.by_weight["a"].sum(0)[~kept].max()
        # This weight is stored transposed: its rows are inputs.
        assert bool((maps["b"].sum(1) % 6 == 0).all())

    def test_debts_are_paid_by_the_next_weight(self) -> None:
        scores = scores_of({str(at): torch.rand(7, 9) for at in range(12)})
        for pattern in ("columns", "rectangle"):
            total = sum(int(chosen.sum()) for chosen in choose(scores, SylvaConfig(sparsity=0.8), pattern).values())
            assert abs(total - 12 * SylvaConfig(sparsity=0.8).blocks(63)) <= 4

    def test_no_rectangle_is_better_under_an_outer_product(self) -> None:
        outer = torch.outer(torch.rand(5), torch.rand(6))
        chosen = choose(scores_of({"a": outer}), SylvaConfig(sparsity=0.8), "rectangle")["a"]
        height, width = int(chosen.any(1).sum()), int(chosen.any(0).sum())
        best = max(
            float(outer[list(rows)][:, list(columns)].sum())
            for rows in itertools.combinations(range(5), height)
            for columns in itertools.combinations(range(6), width)
        )
        assert float(outer[chosen].sum()) == pytest.approx(best)

    def test_learning_rates_share_a_choice_and_budgets_do_not(self) -> None:
        asked: list[int] = []

        def first_ones(name: str, count: int, allowed: Tensor) -> Tensor:
            asked.append(count)
            return allowed & (torch.arange(allowed.numel()).view_as(allowed) < count)

        scores = scores_of({"a": torch.rand(5, 6)}, choose=first_ones)
        first, seconds = choose_once(scores, SylvaConfig(sparsity=0.8), "blocks")
        again, same = choose_once(scores, SylvaConfig(sparsity=0.8), "blocks")
        assert first is again and seconds == same
        other, _ = choose_once(scores, SylvaConfig(sparsity=0.5), "blocks")
        assert asked == [6, 15] == [int(first["a"].sum()), int(other["a"].sum())]


@pytest.mark.parametrize("score", ["greedy", "gain", "paper"])
def test_scores_apart_from_the_choice_give_the_masks_of_trace_and_mask(score: str) -> None:
    model, batches = load_model("tiny", 0), [batch() for _ in range(2)]
    how: dict[str, Any] = {"method": "sylva", "score": score, "num_partitions": 1, "rank": 2}
    config = SylvaConfig(scope=SCOPE, block_size=8, num_samples=16, **how)
    scores = block_scores(model, batches, config, seed=0)
    choose(scores, SylvaConfig(sparsity=0.9))  # one trace serves several budgets
    maps = choose(scores, SylvaConfig(sparsity=0.7))
    masks = sylva_compile.trace_and_mask(model, batches, replace(config, sparsity=0.7, progress=False))
    assert set(maps) == set(masks)
    assert all(torch.equal(maps[name], mask.block_map()) for name, mask in masks.items())
    assert budget_elements(weights_in_scope(model, SCOPE), 0.7, 8) == sum(mask.trainable for mask in masks.values())
