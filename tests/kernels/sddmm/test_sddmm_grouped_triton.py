"""The Triton kernel of grouped products, on a GPU where there is one, else in Triton's interpreter.

As in test_sddmm_triton, the interpreter needs a process of its own.
"""

import os
from collections.abc import Iterator

import pytest
import torch
import triton
from interpreter import run_in_interpreter
from packaging.version import Version

from sylva_compile.kernels.sddmm.configs import Config
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm_reference
from sylva_compile.kernels.sddmm.triton_grouped import grouped_sddmm_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases run in this process")
@pytest.mark.skipif(Version(triton.__version__) < Version("3.7"), reason="Triton 3.6 interprets no loop over a tensor")
def test_the_kernel_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def _outputs_start_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(loads: list[int], unused: int, m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Operands on the device; the tokens of no expert are NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(loads)
    sides = [torch.randn(tokens + unused, width, generator=generator).to(dtype) for width in (m, n)]
    for side in sides:
        side[tokens:] = torch.nan
    return *(side.to(DEVICE) for side in sides), torch.tensor(loads).cumsum(0).to(DEVICE, torch.int32)


@needs_triton
class TestKernel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("splits", [None, 1, 3])
    @pytest.mark.parametrize(
        ("loads", "unused", "m", "n", "b"),
        [
            pytest.param([20, 0, 1, 40], 0, 32, 32, 16, id="an empty expert, one token"),
            pytest.param([0, 0, 7], 5, 16, 32, 16, id="tokens of no expert"),
            pytest.param([5, 33], 0, 24, 20, 12, id="no power of two, over the edge"),
            pytest.param([0, 0], 0, 16, 16, 16, id="no tokens"),
            pytest.param([70, 3, 50], 2, 8, 24, 8, id="small blocks"),
        ],
    )
    def test_equals_the_reference(
        self, loads: list[int], unused: int, m: int, n: int, b: int, splits: int | None, dtype: torch.dtype
    ) -> None:
        lhs, rhs, offsets = operands(loads, unused, m, n, dtype)
        grid = torch.rand(len(loads) * -(-m // b), -(-n // b), generator=torch.Generator().manual_seed(1)) < 0.7
        positions = grid.nonzero().t().to(DEVICE)
        found = grouped_sddmm_triton(lhs, rhs, positions, offsets, b, config=Config(16, 4, 2), splits=splits)
        wanted = grouped_sddmm_reference(lhs.double(), rhs.double(), positions, offsets, b)
        magnitude = grouped_sddmm_reference(lhs.double().abs(), rhs.double().abs(), positions, offsets, b)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found.is_contiguous()
        assert bool(((found.double() - wanted).abs() <= 1e-6 * magnitude).all())

    def test_no_blocks(self) -> None:
        lhs, rhs, offsets = operands([3, 4], 0, 16, 16, torch.float32)
        none = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
        assert grouped_sddmm_triton(lhs, rhs, none, offsets, 16).shape == (0, 16, 16)
