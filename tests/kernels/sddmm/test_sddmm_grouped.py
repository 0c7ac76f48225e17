from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.sddmm import cpu
from sylva_compile.kernels.sddmm.cpu import grouped_sddmm_cpu
from sylva_compile.kernels.sddmm.grouped_op import grouped_sddmm, grouped_sddmm_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def _outputs_start_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Operands `[S, m]` and `[S, n]` of experts with `loads` tokens each, then tokens of none, and some blocks."""

    lhs: Tensor
    rhs: Tensor
    offsets: Tensor
    positions: Tensor
    block_size: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        return self.lhs, self.rhs, self.positions, self.offsets, self.block_size

    def by_loops(self, *, absolute: bool = False) -> Tensor:
        """The twin in float64: one product for each block."""
        b = self.block_size
        per_expert = -(-self.lhs.shape[1] // b)
        found = torch.zeros(self.positions.shape[1], b, b, dtype=torch.float64)
        starts = [0, *self.offsets.tolist()]
        for k, (stacked, col) in enumerate(self.positions.t().tolist()):
            expert, row = divmod(stacked, per_expert)
            tokens = slice(starts[expert], starts[expert + 1])
            left = self.lhs[tokens, row * b : (row + 1) * b].double()
            right = self.rhs[tokens, col * b : (col + 1) * b].double()
            block = left.abs().t() @ right.abs() if absolute else left.t() @ right
            found[k, : block.shape[0], : block.shape[1]] = block
        return found


def case_of(
    loads: list[int], unused: int, m: int, n: int, b: int, density: float, dtype: torch.dtype, seed: int
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor(loads).cumsum(0).to(torch.int32)
    tokens = sum(loads) + unused
    lhs, rhs = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (m, n))
    # Nobody may read the tokens of no expert.
    lhs[sum(loads) :], rhs[sum(loads) :] = torch.nan, torch.nan
    grid = torch.rand(len(loads) * -(-m // b), -(-n // b), generator=generator) < density
    return Case(lhs, rhs, offsets, grid.nonzero().t(), b)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return case_of(
        draw(st.lists(st.sampled_from([0, 0, 1, 2, 127, 128, 129, 300]), min_size=1, max_size=6)),
        draw(st.sampled_from([0, 1, 40])),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
        draw(st.sampled_from([8, 16, 32, 64]) | st.integers(1, 64)),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 10**6)),
    )


@given(cases())
@settings(deadline=None, max_examples=100)
def test_equals_the_products_of_each_expert(case: Case) -> None:
    wanted, magnitude = case.by_loops(), case.by_loops(absolute=True)
    eps = torch.finfo(block_dtype(case.lhs.dtype)).eps
    for compute in (grouped_sddmm, grouped_sddmm_reference):
        found = compute(*case.arguments())
        assert found.shape == wanted.shape and found.dtype == block_dtype(case.lhs.dtype) and found.is_contiguous()
        # Beyond the edges and without tokens the magnitude is zero: what is there has to be exactly zero.
        assert bool(((found.double() - wanted).abs() <= 16 * eps * magnitude).all()), compute


def test_an_expert_without_tokens_gets_zeros() -> None:
    case = case_of([0, 5, 0], 3, 16, 16, 8, 1.0, torch.bfloat16, 0)
    found = grouped_sddmm(*case.arguments())
    assert not found[:4].any() and not found[8:].any()
    assert found[4:8].any()


def test_without_any_token() -> None:
    case = case_of([0, 0], 0, 16, 16, 8, 1.0, torch.float32, 0)
    assert torch.equal(grouped_sddmm(*case.arguments()), torch.zeros(8, 8, 8))


def test_offsets_of_64_bits() -> None:
    case = case_of([3, 4], 0, 16, 16, 8, 1.0, torch.float32, 0)
    wide = grouped_sddmm(case.lhs, case.rhs, case.positions, case.offsets.long(), 8)
    assert torch.equal(wide, grouped_sddmm(*case.arguments()))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    case = case_of([300, 1, 0, 600], 5, 32, 40, 8, 0.7, torch.bfloat16, 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(grouped_sddmm_cpu(*case.arguments()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_closed_gate_gives_zeros() -> None:
    case = case_of([3, 4], 0, 16, 16, 8, 1.0, torch.float32, 0)
    assert not grouped_sddmm(*case.arguments(), torch.tensor(False)).any()
    assert grouped_sddmm(*case.arguments(), torch.tensor(True)).any()


def test_a_position_outside_is_refused() -> None:
    case = case_of([3, 4], 0, 16, 16, 8, 1.0, torch.float32, 0)
    with pytest.raises(IndexError, match="2 experts"):
        grouped_sddmm_cpu(case.lhs, case.rhs, torch.tensor([[4], [0]]), case.offsets, 8)
    with pytest.raises(ValueError, match="equally many rows"):
        grouped_sddmm_cpu(case.lhs, case.rhs[:-1], case.positions, case.offsets, 8)


def test_without_a_compiler_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, *, name: str) -> None:
        raise NativeCompilerError("No C++ compiler.")

    monkeypatch.setattr(cpu, "load", refuse)
    cpu._kernel.cache_clear()
    case = case_of([3, 0, 4], 2, 16, 20, 8, 1.0, torch.float32, 0)
    try:
        found = grouped_sddmm(*case.arguments())
    finally:
        cpu._kernel.cache_clear()
    torch.testing.assert_close(found.double(), case.by_loops(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(grouped_sddmm, case_of([3, 0, 4], 0, 16, 13, 8, 0.6, dtype, 0).arguments())


def test_fake_says_what_the_real_one_returns() -> None:
    case = case_of([3, 4], 0, 16, 16, 8, 0.6, torch.bfloat16, 0)
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(tensor) for tensor in case.arguments()[:4]]
        fake = grouped_sddmm(*fakes, 8)
    real = grouped_sddmm(*case.arguments())
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
