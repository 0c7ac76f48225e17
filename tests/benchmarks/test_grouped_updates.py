"""The benchmark of grouped updates runs, and shows that the number of operations hardly grows with the layers."""

import pytest

from benchmarks import grouped_updates

SMALL = ["--size", "48", "--depth", "2", "--tokens", "20", "--layers", "2", "8", "--repeats", "2", "--no-write"]


def test_small() -> None:
    few, many = grouped_updates.main(SMALL)
    assert few["operations"]["together"] < few["operations"]["one_by_one"]
    assert many["operations"]["one_by_one"] == 4 * few["operations"]["one_by_one"]
    # Each layer adds only a copy of the tokens and a product for the leaves.
    assert many["operations"]["together"] - few["operations"]["together"] <= 6 * 4
    assert many["ratio"] > 0


def test_sums_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_updates, "together", lambda trees, tokens: None)
    with pytest.raises(AssertionError):
        grouped_updates.main(SMALL)
