"""Bytes that `benchmarks.scaling` counts are those that collectives carry; its times are those of a ring."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import two_ranks
from scaling_ranks import CONFIG, SHAPES

from benchmarks import report, scaling
from benchmarks.scaling import COMPUTE, LINKS, Traffic, cell, traffic


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (3, torch.float32)])
def test_counted_bytes_are_those_of_the_messages(ranks: int, dtype: torch.dtype, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    two_ranks.run("scaling_ranks.py", str(ranks), name, tmp_path / "bytes.json", ranks=ranks)
    found = json.loads((tmp_path / "bytes.json").read_text())
    wanted = {
        method: {
            kind: count
            for kind, count in asdict(traffic(method, SHAPES, CONFIG, ranks, dtype.itemsize)).items()
            if count
        }
        for method in COMPUTE
    }
    assert found == wanted


def test_a_ring_sends_almost_everything_once_and_an_all_reduce_twice() -> None:
    gigabyte = 10**9
    assert Traffic(all_gather=gigabyte).seconds(1, 8.0) == 0
    assert Traffic(all_gather=gigabyte).seconds(4, 8.0) == pytest.approx(0.75)
    assert Traffic(reduce_scatter=gigabyte).seconds(4, 8.0) == pytest.approx(0.75)
    assert Traffic(all_reduce=gigabyte).seconds(4, 8.0) == pytest.approx(1.5)


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    monkeypatch.setattr(report, "RESULTS", folder)
    results = scaling.main(command.split())
    [path] = folder.glob("scaling-*.json")
    assert json.loads(path.read_text())["results"] == results
    return results


def test_compute_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--hidden 64 --mlp 96 --layers 1 --tokens 32 --block-size 16 --sparsity 0.8 --repeats 2 --inner aot_eager"
    results = run(small, tmp_path, monkeypatch)
    assert set(results) == set(COMPUTE)
    assert all(row["compute_ms"] > 0 for row in results.values())  # type: ignore[operator]


def test_compute_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("--model Llama-3-8B --step-ms 700 800 600", tmp_path, monkeypatch)
    assert "given, not measured" in capsys.readouterr().out
    # 8.03e9 gradients of two bytes, 2 · 7/8 of them over 15 Gbit/s.
    low, high = results["full, DDP"]["step_ms"]["15 Gbit/s"]["8"]  # type: ignore[index]
    assert low == pytest.approx(1.75 * 8_030_261_248 * 2 / 15e9 * 8 * 1e3)
    assert high == pytest.approx(low + 700)
    assert cell((700.0, 700.2)) == "700" and cell((600.0, 1700.4)) == "600–1,700"
    for name, row in results.items():
        alone = [row["step_ms"][link]["1"] for link in LINKS]  # type: ignore[index]
        assert alone == [[row["compute_ms"]] * 2] * 3, name


def test_compute_is_that_of_a_kept_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "settings": {
            "hidden": 64,
            "mlp": 96,
            "layers": 1,
            "tokens": 8,
            "block_size": 16,
            "sparsity": 0.5,
            "dtype": "bfloat16",
        },
        "results": {name: {"step_ms": {"median": 2.0}} for name in ("frozen", "sylva", "full")},
        "machine": {"gpu": None, "processor": "abacus", "versions": {"torch": "0"}},
        "date": "2000-01-01T00:00",
    }
    (tmp_path / "step-kept.json").write_text(json.dumps(kept))
    results = run("--kept step-kept --layers 3", tmp_path, monkeypatch)
    assert {row["compute_ms"] for row in results.values()} == {6.0}
    assert "LoRA, DDP" not in results
    assert results["full, DDP"]["bytes"]["8"]["all_reduce"] == 2 * (3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64)  # type: ignore[index]


def test_half_of_what_is_needed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--model", "Llama-3-8B"])
    assert "give --model and --step-ms together" in capsys.readouterr().err
