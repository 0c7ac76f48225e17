"""The trace benchmark runs and times every method."""

import pytest

from benchmarks import trace_cost


def test_small(monkeypatch: pytest.MonkeyPatch) -> None:
    # kronfluence calls deprecated functions of torch, which warn.
    monkeypatch.delitem(trace_cost.RUNS, "kronfluence", raising=False)
    options = "--hidden 64 --layers 1 --batch 2 --length 16 --batches 4 --rounds 1 --memory-hidden 0 --no-write"
    found = trace_cost.main(options.split())["time"]["64"]
    assert set(found) == set(trace_cost.RUNS)
    assert found[trace_cost.FLOOR]["of_floor"] == 1.0
