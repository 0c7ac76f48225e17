"""Runs, compiled and not, and the model that all methods begin from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quality_inputs import CHANCE

from benchmarks.quality.grid import Run, Settings
from benchmarks.quality.runner import Runner


def test_a_compiled_run_comes_to_the_same(data: Path) -> None:
    settings = Settings(model="tiny", train=32, validation=16, epochs=1, sparsity=0.7, block_size=8)
    run = Run("sst2", "random", CHANCE, settings, 1e-2, 0)
    runner = Runner(data)
    plain = runner.do(run)
    for layerwise in (False, True):
        compiled = runner.do(replace(run, settings=replace(settings, compile="aot_eager", layerwise=layerwise)))
        assert compiled["test"]["loss"] == pytest.approx(plain["test"]["loss"], rel=1e-4)
        assert compiled["saved_bytes"] < plain["saved_bytes"]


def test_later_runs_are_compiled_like_the_first(data: Path) -> None:
    settings = Settings(
        model="tiny", train=32, validation=16, epochs=1, sparsity=0.7, block_size=8, compile="aot_eager"
    )
    runner = Runner(data)
    with torch._dynamo.config.patch(recompile_limit=3):
        saved = [runner.do(Run("sst2", "random", CHANCE, settings, 1e-2, seed))["saved_bytes"] for seed in range(2)]
    assert saved[1] == pytest.approx(saved[0], rel=0.05)


def test_a_warmed_up_head_is_the_same_for_all_and_the_rest_stays(data: Path) -> None:
    settings = Settings(model="tiny", train=64, validation=32, head_steps=3, block_size=8)
    run = Run("sst2", "random", CHANCE, settings, 1e-3, 0)
    runner = Runner(data)
    cold = runner.model(replace(run, settings=replace(settings, head_steps=0))).state_dict()
    warm = runner.model(run).state_dict()
    changed = {name for name, value in cold.items() if not torch.equal(value, warm[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
