"""The benchmark of moves runs, and its variants do what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import moving, report

SMALL = (
    "--hidden 64 --mlp 96 --layers 4 --tokens 32 --length 16 --block-size 16 --repeats 2 --every 2 --inner aot_eager"
)


def test_every_variant_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    results = moving.main(SMALL.split())
    assert tuple(results) == moving.VARIANTS
    assert not any(row["graphs_while_timed"] for row in results.values())
    assert results["random, columns"]["saved_bytes"] < results["gradient"]["saved_bytes"]
    [path] = tmp_path.glob("moving-*.json")
    assert json.loads(path.read_text())["settings"]["every"] == 2
