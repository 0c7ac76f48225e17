"""Launches happen on the device of their tensors, not on the one that happens to be current."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sylva_compile.kernels import devices
from sylva_compile.kernels.sddmm import triton_kernel as sddmm_triton
from sylva_compile.kernels.sddmm.configs import Config
from sylva_compile.kernels.step import triton_launch as step_triton
from sylva_compile.kernels.step.lowering import lower
from sylva_compile.kernels.step.table import Slot
from sylva_compile.optim import rules


class Kernel:
    """Notes the device that is current when it is launched."""

    def __init__(self, current: list[torch.device]) -> None:
        self.current, self.launched = current, []  # type: list[torch.device], list[list[torch.device]]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append(list(self.current))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made: list[torch.device] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        made.append(device)
        yield
        made.pop()

    for module in (sddmm_triton, step_triton):
        monkeypatch.setattr(module, "current", current)
    return Kernel(made)


def test_sddmm(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sddmm_triton, "_sddmm_kernel", kernel)
    x, positions = torch.zeros(4, 16), torch.zeros(2, 1, dtype=torch.int64)
    sddmm_triton.sddmm_shared_triton([x], x, [positions], 16, config=Config(16, 4, 2), splits=1)
    assert kernel.launched == [[x.device]]


def test_the_optimizer(kernel: Kernel) -> None:
    launch = step_triton.TritonLaunch(lower(rules.lion()), torch.device("cpu"), stochastic=False)
    launch._module = type("Module", (), {"step_kernel": kernel, "parts": type("Parts", (), {"squares_kernel": kernel})})
    parameter, state = torch.zeros(8), torch.zeros(8)
    launch.describe([Slot(parameter, (state,), None, 0, 0, None)], [torch.ones(8)])
    launch.squares()
    launch.step(torch.zeros(1, 4, dtype=torch.float64), torch.ones(()), torch.zeros(()), 0)
    assert kernel.launched == [[launch.device]] * 2


def test_a_gpu_is_made_the_current_one_and_a_cpu_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("current", device))
    assert devices.current(torch.device("cuda", 1)) == ("current", torch.device("cuda", 1))
    assert isinstance(devices.current(torch.device("cpu")), contextlib.nullcontext)
