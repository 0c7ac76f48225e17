"""The benchmark of switches runs, and keeps what it measured."""

import json
from pathlib import Path

import pytest

from benchmarks import report, switching

SMALL = "--layers 1 --hidden 64 --mlp 96 --block-size 16 --sparsity 0.8 --repeats 2"


def test_every_action_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    results = switching.main(SMALL.split())
    assert len(results) == 3 and all(value > 0 for value in results.values())
    [path] = tmp_path.glob("switching-*.json")
    assert json.loads(path.read_text())["results"]["milliseconds"].keys() == results.keys()
