from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from specs import specs_of
from torch import Tensor

from sylva_compile.config import SylvaConfig
from sylva_compile.errors import ArgumentError
from sylva_compile.tracing.selection import select_blocks


def grids(shapes: list[tuple[int, int]], seed: int, levels: int = 0) -> dict[str, Tensor]:
    """Return scores for each shape; with `levels`, of only so many different values, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for index, shape in enumerate(shapes):
        if levels:
            values = torch.randint(levels, shape, generator=generator).double()
        else:
            values = torch.rand(shape, dtype=torch.float64, generator=generator)
        scores[f"layer{index}"] = values
    return scores


def budget(sparsity: float, allocation: str = "layer", column_budget: float | None = None) -> SylvaConfig:
    return SylvaConfig(sparsity=sparsity, allocation=allocation, column_budget=column_budget)  # type: ignore[arg-type]


def slow_best(values: list[float], count: int) -> set[int]:
    """Return the indices of the `count` highest values; of equal values, the first ones."""
    return set(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])


def is_share(count: int, sparsity: float, total: int) -> bool:
    """Return whether `count` is the whole number nearest to the unfrozen share of `total`, and at least one."""
    return abs(count - max(1.0, (1 - sparsity) * total)) <= 0.5 + 1e-6


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
sparsities = st.floats(0.0, 0.999)
seeds = st.integers(0, 1000)


class TestLayer:
    @given(shapes, sparsities, seeds, st.sampled_from([0, 1, 3]))
    @settings(deadline=None, max_examples=100)
    def test_each_weight_keeps_the_best_of_its_own_exactly_so_many(
        self, shapes: list[tuple[int, int]], sparsity: float, seed: int, levels: int
    ) -> None:
        scores = grids(shapes, seed, levels)
        maps = select_blocks(scores, budget(sparsity), specs_of(scores))
        assert list(maps) == list(scores)
        for name, score in scores.items():
            assert maps[name].dtype == torch.bool
            assert maps[name].shape == score.shape
            found = set(maps[name].flatten().nonzero().flatten().tolist())
            assert is_share(len(found), sparsity, score.numel())
            assert found == slow_best(score.flatten().tolist(), len(found))

    @pytest.mark.parametrize(
        ("sparsity", "total", "wanted"),
        [
            (0.98, 50, 1),
            (0.98, 100, 2),
            (0.5, 9, 5),
            (0.5, 5, 3),
            (0.7, 35, 11),
            (0.9, 14, 1),
            (0.9, 15, 2),
            (0.9, 16, 2),
        ],
    )
    @pytest.mark.parametrize("allocation", ["layer", "global"])
    def test_counts_are_rounded_with_halves_up(self, allocation: str, sparsity: float, total: int, wanted: int) -> None:
        scores = {"w": torch.zeros(1, total)}
        config = budget(sparsity, allocation)  # type: ignore[arg-type]
        assert int(select_blocks(scores, config, specs_of(scores))["w"].sum()) == wanted

    def test_one_block_at_least(self) -> None:
        scores = grids([(2, 2), (50, 50)], seed=0)
        maps = select_blocks(scores, budget(0.999), specs_of(scores))
        assert maps["layer0"].sum() == 1
        assert maps["layer0"].flatten()[scores["layer0"].argmax()]

    def test_sparsity_zero_takes_everything(self) -> None:
        scores = grids([(3, 4), (1, 1)], seed=0)
        assert all(bool(chosen.all()) for chosen in select_blocks(scores, budget(0.0), specs_of(scores)).values())

    def test_ties_go_to_the_earlier_position(self) -> None:
        scores = {"w": torch.zeros(4, 5)}
        chosen = select_blocks(scores, budget(0.65), specs_of(scores))["w"]
        assert chosen.flatten().nonzero().flatten().tolist() == list(range(7))

    def test_negative_scores_are_scores(self) -> None:
        scores = {"w": torch.tensor([[-3.0, -1.0], [-2.0, -4.0]])}
        assert select_blocks(scores, budget(0.5), specs_of(scores))["w"].tolist() == [[False, True], [True, False]]


class TestGlobal:
    @given(shapes, sparsities, seeds, st.sampled_from([0, 1, 3]))
    @settings(deadline=None, max_examples=100)
    def test_the_best_of_all_weights_together(
        self, shapes: list[tuple[int, int]], sparsity: float, seed: int, levels: int
    ) -> None:
        scores = grids(shapes, seed, levels)
        maps = select_blocks(scores, budget(sparsity, "global"), specs_of(scores))
        assert list(maps) == list(scores)
        assert all(maps[name].shape == score.shape for name, score in scores.items())
        everything = [value for score in scores.values() for value in score.flatten().tolist()]
        found = torch.cat([chosen.flatten() for chosen in maps.values()]).nonzero().flatten().tolist()
        assert is_share(len(found), sparsity, len(everything))
        assert set(found) == slow_best(everything, len(found))

    def test_a_weight_may_end_up_with_none(self) -> None:
        scores = {"good": torch.ones(4, 4), "bad": torch.zeros(4, 4)}
        maps = select_blocks(scores, budget(0.5, "global"), specs_of(scores))
        assert bool(maps["good"].all())
        assert not maps["bad"].any()

    def test_one_block_at_least_over_all(self) -> None:
        scores = {"a": torch.zeros(2, 2), "b": torch.tensor([[0.0, 1.0]])}
        maps = select_blocks(scores, budget(0.99, "global"), specs_of(scores))
        assert (int(maps["a"].sum()), maps["b"].tolist()) == (0, [[False, True]])

    def test_the_column_budget_holds_in_every_weight(self) -> None:
        scores = grids([(8, 10), (10, 8)], seed=0)
        maps = select_blocks(scores, budget(0.9, "global", 0.3), specs_of(scores, ["layer1"]))
        assert sum(int(chosen.sum()) for chosen in maps.values()) == 16
        assert int(maps["layer0"].any(0).sum()) <= 3
        assert int(maps["layer1"].any(1).sum()) <= 3


class TestColumnBudget:
    @given(
        shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        fraction=st.floats(0.01, 1.0),
        axis=st.sampled_from([0, 1]),
        seed=seeds,
    )
    @settings(deadline=None, max_examples=100)
    def test_at_most_this_fraction_of_input_columns_holds_blocks_and_counts_stay_exact(
        self, shape: tuple[int, int], fraction: float, axis: int, seed: int
    ) -> None:
        scores = {"w": torch.rand(shape, generator=torch.Generator().manual_seed(seed))}
        columns = shape[axis]
        room = max(1, int(fraction * columns)) * shape[1 - axis]
        config = budget(1 - 0.5 * room / scores["w"].numel(), column_budget=fraction)
        chosen = select_blocks(scores, config, specs_of(scores, [] if axis else ["w"]))["w"]
        assert is_share(int(chosen.sum()), config.sparsity, chosen.numel())
        used = int(chosen.any(1 - axis).sum())
        # A fraction that misses a whole number of columns by a rounding error may count as that number.
        assert used <= max(1.0, fraction * columns + 1e-6)
        # In the columns that are used, no block that was left out has a higher score than a chosen block.
        passed_over = chosen.any(1 - axis, keepdim=True) & ~chosen
        if passed_over.any():
            assert scores["w"][chosen].min() >= scores["w"][passed_over].max()

    @pytest.mark.parametrize("axis", [1, 0], ids=["linear", "conv1d"])
    def test_keeps_the_columns_whose_best_blocks_add_up_highest(self, axis: int) -> None:
        # Column 1 holds the single best block; column 2 the best pair. Two blocks in one column: the pair wins.
        score = torch.tensor([[0.0, 9.0, 7.0, 1.0], [0.0, 0.0, 6.0, 1.0], [5.0, 0.0, 0.0, 1.0]])
        score = score if axis == 1 else score.t().contiguous()
        scores = {"w": score}
        specs = specs_of(scores, [] if axis else ["w"])
        chosen = select_blocks(scores, budget(1 - 2 / 12, column_budget=0.25), specs)["w"]
        expected = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
        assert torch.equal(chosen, expected if axis == 1 else expected.t())

    def test_a_budget_of_one_is_none(self) -> None:
        scores = grids([(6, 7)], seed=0)
        free = select_blocks(scores, budget(0.8), specs_of(scores))["layer0"]
        assert torch.equal(select_blocks(scores, budget(0.8, column_budget=1.0), specs_of(scores))["layer0"], free)

    def test_one_column_at_least(self) -> None:
        scores = grids([(6, 7)], seed=0)
        chosen = select_blocks(scores, budget(0.95, column_budget=0.01), specs_of(scores))["layer0"]
        assert int(chosen.any(0).sum()) == 1

    @pytest.mark.parametrize(("fraction", "columns", "kept"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29)])
    def test_a_fraction_that_is_a_whole_number_of_columns_gives_that_number(
        self, fraction: float, columns: int, kept: int
    ) -> None:
        scores = {"w": torch.rand(4, columns, generator=torch.Generator().manual_seed(0))}
        room = budget(1 - kept / columns, column_budget=fraction)
        assert int(select_blocks(scores, room, specs_of(scores))["w"].sum()) == 4 * kept

    @pytest.mark.parametrize("allocation", ["layer", "global"])
    def test_no_room_is_an_error_that_says_what_to_raise(self, allocation: str) -> None:
        scores = grids([(4, 10)], seed=0)
        config = budget(0.5, allocation, column_budget=0.2)
        with pytest.raises(ArgumentError, match=r"room for 8 blocks.*wants 20; raise either"):
            select_blocks(scores, config, specs_of(scores))

    @pytest.mark.parametrize("allocation", ["layer", "global"])
    def test_room_that_is_just_enough(self, allocation: str) -> None:
        scores = grids([(4, 10)], seed=0)
        config = budget(0.8, allocation, column_budget=0.2)
        chosen = select_blocks(scores, config, specs_of(scores))["layer0"]
        assert (int(chosen.sum()), int(chosen.all(0).sum())) == (8, 2)


class TestErrors:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("allocation", ["layer", "global"])
    def test_scores_that_are_not_finite(self, bad: float, allocation: str) -> None:
        scores = {"good": torch.ones(2, 2), "bad": torch.tensor([[1.0, bad]])}
        with pytest.raises(ArgumentError, match="bad: block scores are not finite"):
            select_blocks(scores, budget(0.5, allocation), specs_of(scores))

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, 2, torch.nan])
    def test_sparsity_out_of_range(self, sparsity: float) -> None:
        with pytest.raises(ArgumentError, match="sparsity="):
            budget(sparsity)

    @pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, torch.nan])
    def test_column_budget_out_of_range(self, fraction: float) -> None:
        with pytest.raises(ArgumentError, match="column_budget="):
            budget(0.9, column_budget=fraction)

    def test_unknown_allocation(self) -> None:
        with pytest.raises(ArgumentError, match="allocation='row'"):
            budget(0.9, "row")

    def test_are_value_errors_too(self) -> None:
        with pytest.raises(ValueError, match="sparsity"):
            budget(1.0)


def test_scores_are_left_as_they_are() -> None:
    scores = grids([(4, 5)], seed=0)
    before = scores["layer0"].clone()
    select_blocks(scores, budget(0.8, column_budget=0.5), specs_of(scores))
    assert torch.equal(scores["layer0"], before)


class TestExpertBudget:
    """Four experts of 3 x 2 blocks."""

    SCORES: ClassVar = {"w": torch.arange(24.0).view(12, 2), "linear": torch.arange(24.0).view(12, 2)}
    SPECS: ClassVar = specs_of({"w": torch.empty(4, 24, 16), "linear": torch.empty(96, 16)})

    def test_each_expert_gets_the_same_number(self) -> None:
        config = SylvaConfig(sparsity=0.7, block_size=8, expert_budget="expert")
        chosen = select_blocks(self.SCORES, config, self.SPECS)
        assert chosen["w"].view(4, 6).tolist() == [[False] * 4 + [True] * 2] * 4
        # Other weights have no experts.
        assert chosen["linear"].flatten().nonzero().flatten().tolist() == list(range(17, 24))

    def test_one_block_at_least(self) -> None:
        config = SylvaConfig(sparsity=0.99, block_size=8, expert_budget="expert")
        assert select_blocks(self.SCORES, config, self.SPECS)["w"].view(4, 6).sum(1).tolist() == [1] * 4

    def test_inside_of_the_columns_of_a_budget(self) -> None:
        config = SylvaConfig(sparsity=0.5, block_size=8, expert_budget="expert", column_budget=0.5)
        chosen = select_blocks({"w": self.SCORES["w"]}, config, self.SPECS)["w"]
        assert chosen.view(4, 3, 2).sum((1, 2)).tolist() == [3] * 4 and chosen.any(0).sum() == 1

    def test_a_choice_gets_a_multiple_of_the_experts(self) -> None:
        counts = []

        def choose(name: str, count: int, allowed: Tensor) -> Tensor:
            counts.append((name, count))
            return allowed

        select_blocks(self.SCORES, SylvaConfig(sparsity=0.7, block_size=8, expert_budget="expert"), self.SPECS, choose)
        assert counts == [("w", 8), ("linear", 7)]
