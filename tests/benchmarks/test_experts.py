"""Blocks in experts save what the frozen model saves, and fewer bytes than PEFT's change of the same parameters."""

import pytest

from benchmarks import experts
from sylva_compile.passes import sample_weight_gradients

SMALL = ["--hidden", "128", "--mlp", "96", "--layers", "1", "--experts", "4", "--tokens", "256", "--length", "128"]
OPTIONS = [*SMALL, "--block-size", "16", "--sparsity", "0.9", "--repeats", "2", "--inner", "aot_eager", "--no-write"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_within_two_percent_of_the_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    results = experts.main([*OPTIONS, "--models", "qwen3-moe"])["qwen3-moe"]
    saved = {name: row["saved_bytes"] for name, row in results.items()}
    assert saved["sylva"] <= 1.02 * saved["frozen"]
    assert saved["sylva"] < 0.9 * saved["lora eager"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_it_is_the_gathers_that_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tokens of experts are saved instead, a step saves more than the test above allows."""
    monkeypatch.setattr(sample_weight_gradients, "recompute_gathers", lambda *given: 0)
    monkeypatch.setattr(experts, "available", lambda names: [])
    results = experts.main([*OPTIONS, "--models", "qwen3-moe"])["qwen3-moe"]
    assert results["sylva"]["saved_bytes"] > 1.02 * results["frozen"]["saved_bytes"]
