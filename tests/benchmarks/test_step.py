"""The step benchmark runs and measures every variant."""

import pytest

from benchmarks import step, variants
from benchmarks.variants import VARIANTS

OPTIONS = "--hidden 64 --mlp 96 --layers 1 --tokens 32 --length 16 --block-size 16 --sparsity 0.7 --repeats 2"
SMALL = [*OPTIONS.split(), "--inner", "aot_eager", "--no-write"]


def test_small() -> None:
    results = step.main(SMALL)
    assert set(results) == set(VARIANTS)
    assert results["frozen"]["of_floor"] == 1.0
    assert 0 < results["sylva"]["trainable"] < results["full"]["trainable"]
    assert results["sylva"]["sddmm_ms"] > 0
    assert all(0 < row["saved_bytes"] < row["peak_bytes"] for row in results.values())


def test_without_peft_the_others_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: None)
    assert step.available(("frozen", "sylva", "lora", "lora eager")) == ("frozen", "sylva")
    assert "peft" in capsys.readouterr().out


def test_break_even_counts_the_steps_that_win_compiling_back() -> None:
    def row(ms: float, compiling: float) -> dict:
        return {"step_ms": {"median": ms}, "compile_s": compiling}

    assert step.break_even(row(100, 9), row(200, 1)) == 80
    assert step.break_even(row(100, 1), row(200, 9)) == 0
    assert step.break_even(row(200, 1), row(100, 1)) is None
    assert step.break_even(row(200, 1), None) is None
