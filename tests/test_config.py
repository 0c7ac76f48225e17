"""The settings of a trace: one class validates them, and everything that chooses blocks reads them."""

import dataclasses
import inspect
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import sylva_compile
from sylva_compile import SylvaConfig
from sylva_compile.config import Method
from sylva_compile.curvature.baselines import SCORES_WITHOUT_DATA
from sylva_compile.curvature.estimators import ESTIMATORS
from sylva_compile.errors import ArgumentError

FIELDS = {field.name: field for field in dataclasses.fields(SylvaConfig)}


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 32))


class TestFields:
    def test_every_method_has_an_estimator_or_needs_no_data(self) -> None:
        assert set(get_args(Method)) == set(ESTIMATORS) | set(SCORES_WITHOUT_DATA)
        for method in get_args(Method):
            assert SylvaConfig(method=method).needs_data == (method in ESTIMATORS)

    @pytest.mark.parametrize("name", FIELDS)
    def test_have_help_that_the_documentation_shows(self, name: str) -> None:
        assert FIELDS[name].metadata["help"]
        assert f"    {name}: {FIELDS[name].metadata['help']}." in (SylvaConfig.__doc__ or "")

    def test_are_frozen_and_hashable(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            SylvaConfig().rank = 3  # type: ignore[misc]
        assert len({SylvaConfig(scope=["q_proj"]), SylvaConfig(scope=("q_proj",)), SylvaConfig()}) == 2

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("scope", 3, "a list of names"),
            ("scope", [3], "a list of names"),
            ("sparsity", 1.0, "in [0, 1)"),
            ("sparsity", "0.5", "in [0, 1)"),
            ("block_size", 4, "8 or more"),
            ("block_size", True, "8 or more"),
            ("num_partitions", -1, "0 or more"),
            ("num_samples", True, "1 or more"),
            ("rank", 1.5, "0 or more"),
            ("num_samples", 0, "1 or more"),
            ("checkpoint_every", 0, "1 or more"),
            ("method", "best", "use one of sylva"),
            ("score", "joint", "'greedy', 'gain' or 'paper'"),
            ("allocation", "row", "'layer' or 'global'"),
            ("expert_budget", "each", "'layer' or 'expert'"),
            ("column_budget", 0.0, "(0, 1]"),
            ("column_budget", "all", "(0, 1]"),
            ("damping", 0.0, "above 0"),
            ("damping", float("inf"), "above 0"),
            ("gradient_device", "meta", "None or 'cpu'"),
            ("gradient_device", "no such device", "None or 'cpu'"),
        ],
    )
    def test_a_value_that_cannot_be_used(self, option: str, value: Any, message: str) -> None:
        with pytest.raises(ArgumentError) as caught:
            SylvaConfig(**{option: value})
        assert message in str(caught.value)
        assert option in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_numbers_of_numpy(self) -> None:
        config = SylvaConfig(num_samples=np.int64(8), block_size=np.int32(16), sparsity=np.float32(0.5))  # type: ignore[arg-type]
        assert config == SylvaConfig(num_samples=8, block_size=16, sparsity=0.5)
        assert SylvaConfig.from_json(config.to_json()) == config

    def test_paths_and_devices_become_text(self, tmp_path: Any) -> None:
        config = SylvaConfig(checkpoint=tmp_path / "trace", gradient_device=torch.device("cpu"))  # type: ignore[arg-type]
        assert (config.checkpoint, config.gradient_device) == (str(tmp_path / "trace"), "cpu")


class TestJson:
    def test_there_and_back(self) -> None:
        config = SylvaConfig(scope=["q_proj", "v_proj"], sparsity=0.9, score="paper", damping=0.5, progress=False)
        assert SylvaConfig.from_json(config.to_json()) == config

    def test_numbers_of_other_libraries(self) -> None:
        config = SylvaConfig(sparsity=np.float32(0.5), damping=np.float64(0.25), column_budget=1)
        assert SylvaConfig.from_json(config.to_json()) == SylvaConfig(sparsity=0.5, damping=0.25, column_budget=1.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "no JSON"), ("[1]", "a list"), ('{"ranks": 3}', "no option 'ranks'"), ('{"rank": -3}', "rank=-3")],
    )
    def test_other_text(self, text: str, message: str) -> None:
        with pytest.raises(ArgumentError) as caught:
            SylvaConfig.from_json(text)
        assert message in str(caught.value)


class TestUse:
    def test_a_config_gives_the_masks_of_its_fields(self) -> None:
        model, batches = small(), [torch.randn(4, 32) for _ in range(3)]

        def loss(model: Any, batch: Any) -> torch.Tensor:
            return model(batch).square().mean()

        options = {"block_size": 8, "sparsity": 0.6, "num_samples": 12, "score": "gain", "progress": False}
        config = SylvaConfig(**options)  # type: ignore[arg-type]
        by_field = sylva_compile.trace_and_mask(model, batches, loss_fn=loss, **options)
        by_config = sylva_compile.trace_and_mask(model, batches, config, loss_fn=loss)
        assert dict(by_field) == dict(by_config)
        assert by_field.config == by_config.config
        overridden = sylva_compile.trace_and_mask(model, batches, config, loss_fn=loss, sparsity=0.2)
        assert overridden.config["sparsity"] == 0.2
        assert str(sylva_compile.estimate(model, config)) == str(
            sylva_compile.estimate(model, block_size=8, score="gain")
        )

    def test_masks_keep_the_fields_that_chose_them(self) -> None:
        masks = sylva_compile.trace_and_mask(small(), method="magnitude", block_size=8, scope=["0"], checkpoint="x")
        assert masks.config["scope"] == ["0"]
        assert masks.config["method"] == "magnitude"
        assert not {"checkpoint", "progress", "gradient_device", "checkpoint_every"} & masks.config.keys()

    @pytest.mark.parametrize("function", [sylva_compile.trace_and_mask, sylva_compile.estimate])
    def test_signatures_show_the_fields(self, function: Any) -> None:
        shown = inspect.signature(function).parameters
        assert {name: shown[name].default for name in FIELDS} == {name: one.default for name, one in FIELDS.items()}

    def test_an_option_that_is_none(self) -> None:
        with pytest.raises(ArgumentError, match=r"no option 'sparsities'; use one of scope, sparsity"):
            sylva_compile.trace_and_mask(small(), method="random", sparsities=0.5)
        with pytest.raises(ArgumentError, match="give a SylvaConfig"):
            sylva_compile.trace_and_mask(small(), None, {"method": "random"})  # type: ignore[arg-type]
