"""The benchmark of SLoPe's products runs; a wrong product is never timed, and the GPU's checks are right on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nm_operands import dense_twin
from torch import Tensor

from benchmarks import gpu, report, slope

SHAPES = ["--shapes", "64x32", "32x64", "--tokens", "8", "20"]
SMALL = [*SHAPES, "--patterns", "2:4", "1:4", "--threads", "1", "--repeats", "2"]


def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    before = torch.get_num_threads()
    found = slope.main(SMALL)
    assert torch.get_num_threads() == before
    assert [(row["in"], row["out"], row["pattern"], row["tokens"]) for row in found["times"]] == [
        (inputs, outputs, pattern, tokens)
        for pattern in ("2:4", "1:4")
        for inputs, outputs in ((64, 32), (32, 64))
        for tokens in (8, 20)
    ]
    assert all(value > 0 for row in found["times"] for value in row["ratio"].values())
    assert {row["chosen"]["forward"]["kernel"] for row in found["times"]} == {"sparse"}
    [path] = tmp_path.glob("slope-*.json")
    assert json.loads(path.read_text())["results"] == json.loads(json.dumps(found))


@pytest.mark.parametrize("name", ["forward", "input_gradient", "weight_gradient"])
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(slope.Layer, name)

    def wrong(*arguments: Any) -> Tensor:
        found: Tensor = right(*arguments) * 1.001
        return found

    monkeypatch.setattr(slope.Layer, name, wrong)
    with pytest.raises(AssertionError, match="relative error"):
        slope.main([*SMALL, "--no-write"])


def test_the_second_mask_prefers_zeros_inside_of_the_first() -> None:
    layer = slope.Layer.random((8, 8), 2, 4, torch.float32, "cpu")
    places = dense_twin(torch.ones(8, 4), layer.codes, 2, 4).bool()
    kept = dense_twin(torch.ones(8, 4), layer.second_codes, 2, 4).bool()
    inside = (places.t() & kept).unflatten(1, (2, 4)).sum(2)
    assert torch.equal(inside, places.t().unflatten(1, (2, 4)).sum(2).clamp(max=2))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checks_of_gpus_pass_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, n: int, m: int
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    gpu.check_products(dtype, n, m, 64, 128, 13, device="cpu")
    assert f"{n}:{m}, {dtype}, 13 x 128 x 64: right" in capsys.readouterr().out
