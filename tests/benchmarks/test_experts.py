"""Blocks in experts save what the frozen model saves, and fewer bytes than PEFT's change of the same parameters."""

import pytest

from benchmarks import experts

SMALL = ["--hidden", "128", "--mlp", "96", "--layers", "1", "--experts", "4", "--tokens", "256", "--length", "128"]
OPTIONS = [*SMALL, "--block-size", "16", "--sparsity", "0.9", "--repeats", "2", "--inner", "aot_eager", "--no-write"]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_within_two_percent_of_the_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    results = experts.main([*OPTIONS, "--models", "qwen3-moe"])["qwen3-moe"]
    saved = {name: row["saved_bytes"] for name, row in results.items()}
    assert saved["sylva"] <= 1.02 * saved["frozen"]
    assert saved["sylva"] < 0.9 * saved["lora eager"]
