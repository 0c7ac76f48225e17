"""The benchmark of the memory of pruned models counts what lives."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, slope_memory


def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shape = ["--hidden", "128", "--mlp", "352", "--layers", "1", "--tokens", "8"]
    found = slope_memory.main([*shape, "--patterns", "2:4", "1:4"])
    dense, half, quarter = found["dense"], found["2:4"], found["1:4"]
    assert all(half[name] < dense[name] for name in ("held", "peak", "inference"))
    assert all(quarter[name] < half[name] for name in dense)
    assert half["inference"] < half["rank 1/64"] < half["rank 1/16"] and half["inference"] < half["evaluated"]
    [path] = tmp_path.glob("slope_memory-*.json")
    assert json.loads(path.read_text())["results"] == found


def test_memory_that_is_shared_counts_once() -> None:
    cpu = torch.device("cpu")
    before = slope_memory.living_bytes(cpu)
    whole = torch.zeros(1024)
    parts = [whole[:4], whole.view(2, 512), torch.zeros(16)]
    assert slope_memory.living_bytes(cpu) - before == 4096 + 64
    del whole, parts
    assert slope_memory.living_bytes(cpu) == before
