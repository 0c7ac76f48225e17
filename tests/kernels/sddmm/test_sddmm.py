from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.blocks import block_dtype, read_blocks
from sylva_compile.kernels.sddmm import cpu as cpu
from sylva_compile.kernels.sddmm.cpu import sddmm_by_products, sddmm_cpu, segments_of
from sylva_compile.kernels.sddmm.op import sddmm, sddmm_reference

WAYS = (sddmm, sddmm_by_products, sddmm_reference)


@pytest.fixture(autouse=True, scope="module")
def _outputs_start_as_nan() -> Iterator[None]:
    """Elements that a kernel leaves unwritten are NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided"]


def operand(tokens: int, width: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """`[tokens, width]`; what lies between its elements is NaN, so that reading it would show."""
    values = torch.randn(tokens, width, generator=generator).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.t().contiguous().t()
    apart = torch.full((2 * tokens + 1, 2 * width + 1), torch.nan, dtype=dtype)
    view = apart[1::2, 1::2]
    return view.copy_(values)


@dataclass
class Case:
    """Operands `lhs [T, m]`, `rhs [T, n]` and some blocks of their product."""

    lhs: Tensor
    rhs: Tensor
    positions: Tensor
    block_size: int

    def oracle(self) -> Tensor:
        return read_blocks(self.lhs.double().t() @ self.rhs.double(), self.positions, self.block_size)

    def budget(self) -> Tensor:
        """The error that the dense product in the operands' own dtype makes, and a few roundings of the wide sum."""
        exact = self.lhs.double().t() @ self.rhs.double()
        dense = (self.lhs.t() @ self.rhs).double()
        largest = (dense - exact).abs().max() if exact.numel() else torch.zeros(())
        magnitude = self.lhs.double().abs().t() @ self.rhs.double().abs()
        rounding = 2 * torch.finfo(block_dtype(self.lhs.dtype)).eps * magnitude
        if self.lhs.dtype == torch.float64:
            # The oracle is no more precise than what it judges: allow what two orders of summation can differ by.
            rounding *= len(self.lhs)
        return read_blocks(largest + rounding, self.positions, self.block_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    b = draw(st.sampled_from([8, 16, 32, 64, 128]) | st.integers(1, 128))
    tokens = draw(st.sampled_from([0, 1, 128, 129, 600]) | st.integers(2, 200))
    m, n = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    lhs = operand(tokens, m, dtype, draw(st.sampled_from(LAYOUTS)), generator)
    rhs = operand(tokens, n, dtype, draw(st.sampled_from(LAYOUTS)), generator)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    positions = (torch.rand(-(-m // b), -(-n // b), generator=generator) < density).nonzero().t()
    return Case(lhs, rhs, positions, b)


@given(cases())
@settings(deadline=None, max_examples=150)
def test_no_worse_than_the_dense_product_and_a_few_roundings(case: Case) -> None:
    for compute in WAYS:
        found = compute(case.lhs, case.rhs, case.positions, case.block_size)
        assert found.shape == (case.positions.shape[1], case.block_size, case.block_size)
        assert found.dtype == block_dtype(case.lhs.dtype)
        assert found.is_contiguous()
        # Beyond the edges the oracle and the budget are both zero: what is there has to be exactly zero.
        error = (found.double() - case.oracle()).abs()
        assert bool((error <= case.budget()).all()), compute


def fixed(m: int, n: int, tokens: int, b: int, grid: list[list[int]], dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)
    lhs, rhs = (operand(tokens, width, dtype, "contiguous", generator) for width in (m, n))
    return Case(lhs, rhs, torch.tensor(grid).nonzero().t(), b)


class TestShapes:
    """The corners that a drawn shape might miss."""

    @pytest.mark.parametrize(
        "case",
        [
            pytest.param(fixed(20, 20, 9, 8, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]), id="no blocks"),
            pytest.param(fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]), id="all blocks"),
            pytest.param(fixed(20, 20, 9, 8, [[0, 0, 0], [0, 0, 0], [0, 0, 1]]), id="the corner only"),
            pytest.param(fixed(20, 20, 9, 8, [[0, 0, 0], [1, 1, 1], [0, 0, 0]]), id="one row"),
            pytest.param(fixed(20, 20, 9, 8, [[0, 0, 1], [0, 0, 1], [0, 0, 1]]), id="one column"),
            pytest.param(fixed(20, 20, 9, 8, [[1, 0, 1], [0, 1, 0], [1, 0, 1]]), id="chessboard"),
            pytest.param(fixed(16, 16, 9, 8, [[0, 1], [1, 0]]), id="no remainder"),
            pytest.param(fixed(3, 5, 9, 8, [[1]]), id="block larger than the matrix"),
            pytest.param(fixed(1, 1, 1, 1, [[1]]), id="one number"),
            pytest.param(fixed(20, 20, 0, 8, [[1, 0, 1], [0, 1, 0], [1, 0, 1]]), id="no tokens"),
        ],
    )
    def test_matches_the_oracle(self, case: Case) -> None:
        for compute in WAYS:
            found = compute(case.lhs, case.rhs, case.positions, case.block_size)
            torch.testing.assert_close(found.double(), case.oracle(), rtol=1e-5, atol=1e-5)

    def test_without_tokens_the_gradient_is_zero(self) -> None:
        case = fixed(20, 20, 0, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        found = sddmm(case.lhs, case.rhs, case.positions, 8)
        assert found.shape == (9, 8, 8)
        assert not found.any()

    def test_positions_need_no_order(self) -> None:
        case = fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        order = torch.tensor([4, 0, 8, 1, 2, 7, 3, 6, 5])
        found = sddmm(case.lhs, case.rhs, case.positions[:, order], 8)
        torch.testing.assert_close(found.double(), case.oracle()[order], rtol=1e-5, atol=1e-5)

    def test_an_expanded_operand_is_read_as_it_looks(self) -> None:
        # The gradient of a sum over tokens: one row, repeated with stride zero.
        case = fixed(20, 20, 9, 8, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
        case.lhs = torch.arange(20.0).expand(9, 20)
        found = sddmm(case.lhs, case.rhs, case.positions, 8)
        torch.testing.assert_close(found.double(), case.oracle(), rtol=1e-5, atol=1e-5)


class TestCompiled:
    """Properties of the compiled kernel of the CPU alone."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [127, 256, 1100])
    def test_any_number_of_threads_gives_the_same_bits(self, dtype: torch.dtype, tokens: int) -> None:
        case = fixed(40, 50, tokens, 16, [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]], dtype)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(sddmm_cpu(case.lhs, case.rhs, case.positions, 16))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("b", [16, 32])
    def test_many_small_blocks_have_the_bits_of_few(self, dtype: torch.dtype, layout: str, b: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lhs, rhs = (operand(300, width, dtype, layout, generator) for width in (10 * b + 3, 12 * b - 5))
        lhs[7, 10 * b + 2], rhs[5, 12 * b - 6] = torch.inf, torch.nan
        chosen = torch.rand(11, 12, generator=generator) < 0.9
        # Many blocks share packed panels; those of one block row alone do not.
        expected = [
            sddmm_cpu(lhs, rhs, torch.stack([torch.full_like(cols, row), cols]), b)
            for row in range(11)
            for cols in [chosen[row].nonzero().squeeze(1)]
        ]
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                found = sddmm_cpu(lhs, rhs, chosen.nonzero().t(), b)
                torch.testing.assert_close(found, torch.cat(expected), rtol=0.0, atol=0.0, equal_nan=True)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize(("tokens", "nnz"), [(1, 1), (255, 1), (512, 1), (2048, 5), (10**6, 1), (10**6, 10**6)])
    def test_segments_hold_tokens_enough_to_be_worth_it(self, tokens: int, nnz: int) -> None:
        segments = segments_of(tokens, nnz)
        assert segments == 1 or (tokens // segments >= 256 and segments * nnz < 64 + nnz)

    @pytest.mark.parametrize("bad", [[[3], [0]], [[0], [3]], [[-1], [0]], [[0], [-1]]])
    def test_a_position_outside_is_refused(self, bad: list[list[int]]) -> None:
        case = fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        with pytest.raises(IndexError, match="outside"):
            sddmm_cpu(case.lhs, case.rhs, torch.tensor(bad), 8)

    def test_operands_that_do_not_fit_each_other_are_refused(self) -> None:
        # The kernel reads by address: it would go on past the end of the smaller one.
        case = fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        at = torch.tensor([[0], [0]])
        with pytest.raises(ValueError, match="float64"):
            sddmm_cpu(case.lhs.double(), case.rhs.float(), at, 8)
        with pytest.raises(ValueError, match="equally many rows"):
            sddmm_cpu(case.lhs, case.rhs[:-1], at, 8)
        with pytest.raises(ValueError, match="int32"):
            sddmm_cpu(case.lhs, case.rhs, at.int(), 8)

    def test_infinities_stay_inside_the_matrix(self) -> None:
        case = fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        case.lhs[:, 17] = torch.inf
        case.rhs[:, 18] = torch.inf
        found = sddmm_cpu(case.lhs, case.rhs, case.positions, 8)
        assert torch.isfinite(found[-1][4:]).all() and torch.isfinite(found[-1][:, 4:]).all()
        assert not torch.isfinite(found[-1][1, 2])

    def test_without_a_compiler_it_says_so_once_and_is_right(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(source: str, *, name: str) -> None:
            raise NativeCompilerError("No C++ compiler.")

        monkeypatch.setattr(cpu, "load", refuse)
        cpu._kernel.cache_clear()
        case = fixed(20, 20, 9, 8, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
        try:
            for _ in range(2):
                found = sddmm(case.lhs, case.rhs, case.positions, 8)
        finally:
            cpu._kernel.cache_clear()
        torch.testing.assert_close(found.double(), case.oracle(), rtol=1e-5, atol=1e-5)
        assert caplog.text.count("without its compiled kernel") == 1


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_operands_are_summed_in_float32(self, dtype: torch.dtype) -> None:
        # 4096 ones: a sum kept in bfloat16 sticks at 256, one in float16 at 2048.
        ones = torch.ones(4096, 8, dtype=dtype)
        found = sddmm(ones, ones, torch.tensor([[0], [0]]), 8)
        assert found.eq(4096.0).all()

    def test_float16_products_do_not_overflow(self) -> None:
        large = torch.full((4, 8), 1e4, dtype=torch.float16)
        found = sddmm(large, large, torch.tensor([[0], [0]]), 8)
        assert torch.isfinite(found).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 9, 129])
    def test_a_last_odd_token_that_is_infinite_spoils_its_columns_alone(self, dtype: torch.dtype, tokens: int) -> None:
        # Processors with instructions for bfloat16 take tokens in pairs.
        case = fixed(16, 16, tokens, 8, [[1, 1], [1, 1]], dtype)
        case.lhs[-1, 3] = case.rhs[-1, 12] = torch.inf
        for compute in WAYS:
            found = compute(case.lhs, case.rhs, case.positions, 8)
            finite = read_blocks((case.lhs.t().double() @ case.rhs.double()).isfinite(), case.positions, 8)
            assert torch.equal(found.isfinite(), finite), compute
            assert int((~found.isfinite()).sum()) == 31

    def test_operands_stay_as_they_are(self) -> None:
        case = fixed(20, 20, 9, 8, [[1, 1, 1], [1, 1, 1], [1, 1, 1]])
        before = case.lhs.clone(), case.rhs.clone(), case.positions.clone()
        sddmm(case.lhs, case.rhs, case.positions, 8)
        for tensor, copy in zip((case.lhs, case.rhs, case.positions), before, strict=True):
            assert torch.equal(tensor, copy)


class TestOperator:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype: torch.dtype) -> None:
        case = fixed(20, 13, 9, 8, [[1, 0], [0, 1], [1, 1]], dtype)
        torch.library.opcheck(sddmm, (case.lhs, case.rhs, case.positions, 8))

    @pytest.mark.parametrize("grid", [[[0, 0], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]], ids=["empty", "full"])
    def test_opcheck_strided(self, grid: list[list[int]]) -> None:
        case = fixed(20, 13, 9, 8, grid)
        generator = torch.Generator().manual_seed(0)
        lhs = operand(9, 20, torch.float32, "transposed", generator)
        rhs = operand(9, 13, torch.float32, "strided", generator)
        torch.library.opcheck(sddmm, (lhs, rhs, case.positions, 8))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_fake_says_what_the_real_one_returns(self, dtype: torch.dtype) -> None:
        case = fixed(20, 13, 9, 8, [[1, 0], [0, 1], [1, 1]], dtype)
        mode = FakeTensorMode()
        with mode:
            fake = sddmm(*(mode.from_tensor(t) for t in (case.lhs, case.rhs, case.positions)), 8)
        real = sddmm(case.lhs, case.rhs, case.positions, 8)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
