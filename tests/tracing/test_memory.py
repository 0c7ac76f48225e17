"""The estimate of a trace's memory, against the memory that it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import specs_of
from torch import Tensor, nn

import sylva_compile
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature import update_queue
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.tracing import memory

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self, size: int = 48) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(size, size), nn.Linear(size, size)
        self.down = nn.Linear(size, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.q(x) * self.k(x)).square().mean()


def loss(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch)


@pytest.mark.parametrize(
    ("method", "score"),
    [("sylva", "greedy"), ("sylva", "gain"), ("sylva", "paper"), ("kfac", "gain"), ("fisher", "gain")],
)
def test_the_estimate_is_what_is_held_but_for_shared_factors(method: Any, score: Any) -> None:
    model = Attention()
    found = sylva_compile.estimate(model, method=method, score=score, block_size=16)
    weights = {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight")}
    held = Estimators(specs_of(weights), SylvaConfig(method=method, score=score, block_size=16))
    for name, weight in weights.items():
        held.update(name, torch.randn(5, weight.shape[1]), torch.randn(5, weight.shape[0]))
        held.end_batch()
    # The estimate may leave out scalars, such as the number of tokens of each weight.
    actual = sum(tensor.nbytes for tensor in held.state().values() if tensor.dim() > 0)
    rows = found.weights.values()
    estimated = sum(row.memory.input_factor + row.memory.output_factor + row.memory.gradient for row in rows)
    small = sum(tensor.nbytes for tensor in held.state().values() if tensor.dim() == 0)
    assert actual <= estimated <= actual + small
    scoring = max(row.memory.scoring for row in rows)
    assert found.at_most() == {CPU: estimated + scoring}
    assert found.at_least() == {CPU: estimated + scoring - sum(row.memory.input_factor for row in rows)}


def test_updates_that_wait_are_counted_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    # All weights of a device share one queue, with one bound. The queue may stay empty, and is empty during scoring.
    monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", 2**30)
    hierarchies = sylva_compile.estimate(Attention(), score="paper", block_size=16)
    assert hierarchies.at_most()[CPU] == 2**30 + sum(
        row.memory.input_factor + row.memory.output_factor + row.memory.gradient for row in hierarchies.weights.values()
    )
    assert hierarchies.at_least()[CPU] < 2**20
    assert sylva_compile.estimate(Attention(), score="gain", block_size=16).at_most()[CPU] < 2**20


def test_gradients_elsewhere_are_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = specs_of({"q.weight": nn.Parameter(torch.empty(48, 48))})
    config = SylvaConfig(score="gain", block_size=16)
    beside = memory.estimate_bytes(specs, config)
    # The meta device stands for a GPU, which this machine may not have; config would refuse it.
    monkeypatch.setattr(memory, "gradient_device", lambda config: torch.device("meta"))
    elsewhere = memory.estimate_bytes(specs, config)
    assert elsewhere.at_most()[torch.device("meta")] == 4 * 48 * 48
    assert elsewhere.at_most()[CPU] == beside.at_most()[CPU] - 4 * 48 * 48


def test_it_prints_as_a_table() -> None:
    text = str(sylva_compile.estimate(Attention(), block_size=16))
    assert [line.split()[-1] for line in text.splitlines()[:4]] == ["weight", "q.weight", "k.weight", "down.weight"]
    assert text.splitlines()[-2].startswith("cpu: ")
    held = sum(weight.numel() * 4 for name, weight in Attention().named_parameters() if name.endswith("weight"))
    assert f"up to {held / 1024:.1f} KiB on the cpu" in text.splitlines()[-1]


def test_a_trace_that_would_not_fit_says_so_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    loader = iter([torch.randn(4, 48)])
    with pytest.raises(TraceError, match=r"would hold .* on cpu .* 1.0 KiB are free; use"):
        sylva_compile.trace_and_mask(Attention(), loader, block_size=16, loss_fn=loss, progress=False)
    assert len(list(loader)) == 1


def test_a_trace_that_may_not_fit_runs_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Attention()
    least = sylva_compile.estimate(model, block_size=16).at_least()[CPU]
    monkeypatch.setattr(memory, "free_bytes", lambda device: least)
    loader = [torch.randn(4, 48)]
    sylva_compile.trace_and_mask(model, loader, block_size=16, loss_fn=loss, progress=False, num_samples=4)
    assert "may not fit" in caplog.text


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("score", ["gain", "greedy", "paper"])
def test_scoring_takes_no_more_than_estimated(score: Any, experts: int) -> None:
    weights = {"0.weight": torch.empty(900, 600) if experts == 1 else torch.empty(experts, 480, 600)}
    config = SylvaConfig(score=score, block_size=32)
    held = Estimators(specs_of(weights), config)
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * 50
    rows = 900 if experts == 1 else 480
    held.update("0.weight", torch.randn(50 * experts, 600), torch.randn(50 * experts, rows), ends)
    grid = torch.ones(-(-experts * rows // 32), 19, dtype=torch.bool)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if score == "greedy":
            held.take_greedy_map("0.weight", 20, grid)
        else:
            held.take_scores("0.weight")
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    estimated = memory.estimate_bytes(specs_of(weights), config).weights["0.weight"].memory.scoring
    print(f"{score}: peak {peak / 2**20:.1f} MiB, estimated {estimated / 2**20:.1f} MiB")
    assert 0.2 * estimated < peak <= estimated


def test_free_bytes_are_those_of_the_machine_or_of_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = memory.free_bytes(CPU)
    assert 0 < free < 2**50
    (tmp_path / "memory.max").write_text("20000\n")
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1345\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert memory.free_bytes(CPU) == 20000 - 9000 + 1345
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 2**24


def test_methods_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match="nothing to estimate"):
        sylva_compile.estimate(Attention(), method="random")  # type: ignore[arg-type]
