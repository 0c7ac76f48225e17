import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylva_compile.schedules.choice import Cycle, sample, sample_columns


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestSample:
    @given(st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0, math.inf]), st.booleans(), st.integers(0, 99))
    def test_takes_as_many_as_asked_of_the_allowed_places(
        self, count: int, temperature: float, scored: bool, seed: int
    ) -> None:
        allowed = torch.rand(5, 6, generator=generator(seed)) < 0.7
        scores = torch.rand(5, 6, generator=generator(seed + 1)).round() if scored else None
        chosen = sample(scores, min(count, int(allowed.sum())), allowed, temperature, generator(seed))
        assert int(chosen.sum()) == min(count, int(allowed.sum()))
        assert not bool((chosen & ~allowed).any())

    def test_temperature_zero_takes_the_highest(self) -> None:
        scores = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.0]])
        chosen = sample(scores, 3, torch.ones(2, 3, dtype=torch.bool), 0.0, generator())
        assert chosen.tolist() == [[False, True, False], [True, False, True]]

    @pytest.mark.parametrize(("temperature", "weights"), [(1.0, [1, 2, 4]), (0.5, [1, 4, 16]), (math.inf, [1, 1, 1])])
    def test_draws_in_proportion_to_the_score(self, temperature: float, weights: list[float]) -> None:
        source, draws = generator(), 6000
        scores, allowed = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, dtype=torch.bool)
        counts = sum(sample(scores, 1, allowed, temperature, source).double() for _ in range(draws))
        expected = torch.tensor(weights, dtype=torch.float64) / sum(weights) * draws
        # 99.99% of a chi-square with two degrees of freedom.
        assert float(((counts - expected) ** 2 / expected).sum()) < 18.4


def test_columns_are_those_of_the_highest_blocks_of_all_weights() -> None:
    one = torch.tensor([[9.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, 0.0, 200.0]])
    chosen = sample_columns([one, other], [2, 2], 2, 0.0, generator())
    assert chosen.tolist() == [True, False, False, True]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_cycle_takes_every_place_before_any_twice(places: int, count: int, seed: int) -> None:
    count, source = min(places, count), generator(seed)
    cycle, seen = Cycle(places), torch.zeros(places, dtype=torch.int64)
    for k in range(12):
        if k == 5:
            state = cycle.state_dict()
            cycle = Cycle(places)
            cycle.load_state_dict(state)
        chosen = cycle.take(count, source)
        assert int(chosen.sum()) == count
        seen += chosen
        assert int(seen.max() - seen.min()) <= 1
