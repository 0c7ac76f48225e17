"""The Triton kernel, on a GPU where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter needs a process of its own: without a GPU,
this file runs itself again with the variable set. To see its cases, run it so by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from packaging.version import Version
from torch import Tensor

import sylva_compile
from sylva_compile.kernels.sddmm import sddmm_reference
from sylva_compile.kernels.sddmm_triton import sddmm_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")
# Triton 3.7's interpreter holds bfloat16 as the 16-bit integers that spell it, and its dot multiplies those.
no_bfloat16 = pytest.mark.xfail(INTERPRETED, reason="tl.dot of bfloat16 is wrong in Triton's interpreter", strict=True)
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.float64, id="float64"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=no_bfloat16),
]


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases run in this process")
@pytest.mark.skipif(Version(triton.__version__) < Version("3.7"), reason="Triton 3.6 interprets no loop over a tensor")
def test_the_kernel_in_the_interpreter() -> None:
    root = str(Path(sylva_compile.__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def random(tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """`[tokens, width]` with NaN between its elements, so that an address which is a little off shows."""
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    apart = torch.full((tokens + 2, width + 3), torch.nan, dtype=dtype)
    apart[1 : tokens + 1, 1 : width + 1] = values
    return apart.to(DEVICE)[1 : tokens + 1, 1 : width + 1]


def check(lhs: Tensor, rhs: Tensor, positions: Tensor, b: int, tolerance: float = 1e-6) -> None:
    found = sddmm_triton(lhs, rhs, positions.to(DEVICE), b)
    expected = sddmm_reference(lhs.double(), rhs.double(), positions.to(DEVICE), b)
    assert found.dtype == (torch.float64 if lhs.dtype == torch.float64 else torch.float32)
    assert found.is_contiguous()
    # Both read the same operands and sum in float32 or wider; where both are exactly zero, beyond the edges, so must
    # the difference be.
    magnitude = sddmm_reference(lhs.double().abs(), rhs.double().abs(), positions.to(DEVICE), b)
    error = (found.double() - expected).abs()
    assert bool((error <= tolerance * magnitude).all()), error.max()


@needs_triton
class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("b", [8, 16, 24, 32, 64, 128])
    def test_block_sizes_and_dtypes_with_remainders(self, b: int, dtype: torch.dtype) -> None:
        m, n = 2 * b + 3, b + b // 2 + 1
        positions = torch.tensor([[0, 0, 1, 2], [0, 1, 0, 1]])
        check(random(70, m, dtype, 0), random(70, n, dtype, 1), positions, b)

    @pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65])
    def test_tokens_around_the_tile(self, tokens: int) -> None:
        check(
            random(tokens, 20, torch.float32, 0),
            random(tokens, 20, torch.float32, 1),
            torch.tensor([[0, 1], [1, 0]]),
            16,
        )

    @pytest.mark.parametrize("turned", ["lhs", "rhs", "both"])
    def test_transposed_operands(self, turned: str) -> None:
        lhs, rhs = random(33, 20, torch.float32, 0), random(33, 41, torch.float32, 1)
        if turned != "rhs":
            lhs = lhs.t().contiguous().t()
        if turned != "lhs":
            rhs = rhs.t().contiguous().t()
        check(lhs, rhs, torch.tensor([[0, 0, 1], [0, 2, 1]]), 16)

    def test_an_operand_with_stride_zero(self) -> None:
        lhs = torch.arange(20.0, device=DEVICE).expand(33, 20)
        check(lhs, random(33, 20, torch.float32, 1), torch.tensor([[0, 1], [0, 1]]), 16)

    def test_one_block(self) -> None:
        check(random(5, 16, torch.float32, 0), random(5, 16, torch.float32, 1), torch.tensor([[0], [0]]), 16)

    def test_no_block(self) -> None:
        nothing = torch.zeros(2, 0, dtype=torch.int64)
        assert sddmm_triton(random(5, 16, torch.float32, 0), random(5, 16, torch.float32, 1), nothing, 16).shape == (
            0,
            16,
            16,
        )

    def test_every_block_in_any_order(self) -> None:
        positions = torch.ones(3, 4).nonzero().t().flip(1)
        check(random(40, 43, torch.float32, 0), random(40, 50, torch.float32, 1), positions, 16)

    def test_block_larger_than_the_matrix(self) -> None:
        check(random(9, 3, torch.float32, 0), random(9, 5, torch.float32, 1), torch.tensor([[0], [0]]), 32)

    def test_one_row_by_one_column(self) -> None:
        # Triton compiles the number 1 into the kernel, so a size of one takes another path.
        check(random(1, 1, torch.float32, 0), random(1, 1, torch.float32, 1), torch.tensor([[0], [0]]), 8)

    def test_positions_that_are_a_view(self) -> None:
        positions = torch.tensor([[0, 1], [0, 2], [1, 0]]).t()
        assert not positions.is_contiguous()
        check(random(9, 40, torch.float32, 0), random(9, 40, torch.float32, 1), positions, 16)

    def test_tf32_asked_for_through_torchs_new_switch(self) -> None:
        # Once this one is used, torch refuses to tell the state of the old switch, `allow_tf32`.
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            check(random(9, 40, torch.float32, 0), random(9, 40, torch.float32, 1), torch.tensor([[0], [1]]), 16, 1e-3)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
