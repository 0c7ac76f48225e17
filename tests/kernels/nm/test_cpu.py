"""The N:M product on the CPU against float64."""

import functools
import platform
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from nm_operands import PATTERNS, dense_twin, nm_operand
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.build import native
from sylva_compile.kernels.nm import choice, libraries, products
from sylva_compile.kernels.nm import cpu as kernel
from sylva_compile.kernels.nm.places import dense_matrix
from sylva_compile.kernels.nm_mm import nm_mm, nm_mm_reference, to_dense

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_PATTERNS = [(3, 4), (4, 8), (3, 5), (5, 20), (1, 256)]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]


@pytest.fixture(autouse=True, scope="module")
def _outputs_start_as_nan() -> Iterator[None]:
    """Elements that a kernel leaves unwritten are NaN. Nothing is measured, so float32 takes the sparse kernel."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patch:
        # Small products use all threads too.
        patch.setattr(libraries, "PRODUCTS_PER_THREAD", 1)
        patch.setattr(libraries, "MOVES_PER_THREAD", 1)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _threads_as_found() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def forget() -> None:
    """Let the libraries be loaded again."""
    libraries.products.cache_clear()
    libraries.places.cache_clear()


def input_of(tokens: int, width: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """`[tokens, width]`; elements that lie between those of a strided input are NaN."""
    values = torch.randn(tokens, width, generator=generator).to(dtype)
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "strided":
        return torch.full((2 * tokens + 1, 2 * width + 1), torch.nan, dtype=dtype)[1::2, 1::2].copy_(values)
    if layout == "expanded":
        return values[:1].expand(tokens, width) if tokens else values
    return values


Case = tuple[Tensor, Tensor, Tensor, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, m = draw(st.sampled_from([*PATTERNS, *ODD_PATTERNS]))
    groups = draw(st.integers(1, 40) | st.sampled_from([128, 300])) if m < 20 else draw(st.integers(1, 6))
    rows = draw(st.integers(1, 40) | st.sampled_from([95, 96, 97, 200]))
    tokens = draw(st.integers(0, 40) | st.sampled_from([63, 64, 65, 97, 130, 200]))
    layout, threads = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from(kernel.DTYPES))
    values, codes = nm_operand(rows, groups * m, n, m, dtype, generator)
    return input_of(tokens, groups * m, dtype, layout, generator), values, codes, n, m, threads


def budget(x: Tensor, dense: Tensor) -> Tensor:
    """The error that is allowed for each element of `x · denseᵀ`.

    That of sums in float32 is 2e-6 of the sum of absolute products. Other dtypes round them once.
    """
    sums = 2e-6 * (x.double().abs() @ dense.abs().t()) + 1e-30
    if x.dtype == torch.float32:
        return sums
    return sums + torch.finfo(x.dtype).eps / 2 * ((x.double() @ dense.t()).abs() + sums)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_equals_the_float64_product(case: Case) -> None:
    x, values, codes, n, m, threads = case
    torch.set_num_threads(threads)
    dense = dense_twin(values, codes, n, m)
    torch.testing.assert_close(dense_matrix(values, codes, n, m).double(), dense, rtol=0.0, atol=0.0)
    exact, magnitude = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    # torch's own products may round as they add.
    loose = max(4 * torch.finfo(x.dtype).eps, 2e-6) * magnitude + 1e-30
    for found, allowed in (
        (nm_mm(x, values, codes, n, m, False), budget(x, dense)),
        (kernel.sparse_product(x, values, codes, n, m), budget(x, dense)),
        (kernel.dense_product(x, values, codes, n, m), loose),
        (nm_mm_reference(x, values, codes, n, m, False), loose),
    ):
        assert found.shape == (len(x), len(values)) and found.is_contiguous() and found.dtype == x.dtype
        assert bool(((found.double() - exact).abs() <= allowed).all())


@given(cases())
@settings(deadline=None, max_examples=25)
def test_the_transposed_product_equals_the_float64_one(case: Case) -> None:
    _, values, codes, n, m, threads = case
    torch.set_num_threads(threads)
    gradient, values = torch.randn(7, len(values), generator=torch.Generator().manual_seed(0)), values.float()
    dense = dense_twin(values, codes, n, m)
    found = nm_mm(gradient, values, codes, n, m, True)
    assert found.shape == (7, dense.shape[1]) and found.is_contiguous()
    assert bool(((found.double() - gradient.double() @ dense).abs() <= budget(gradient, dense.t())).all())


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_bfloat16_is_the_float32_product_rounded_once(tokens: int) -> None:
    """Products of bfloat16 are exact in float32, and sums are taken in the same order."""
    generator = torch.Generator().manual_seed(0)
    values, codes = nm_operand(101, 2100, 2, 4, torch.bfloat16, generator)
    x = torch.randn(tokens, 2100, generator=generator).bfloat16()
    x[0, :4] = torch.tensor([torch.inf, 1e38, -torch.inf, 3e38])
    wide = kernel.sparse_product(x.float(), values.float(), codes, 2, 4)
    found = kernel.sparse_product(x, values, codes, 2, 4)
    assert wide[0].isnan().any() and wide[0].isinf().any()
    assert torch.equal(found.isnan(), wide.isnan())
    assert torch.equal(found.nan_to_num(0.0, 1.0, -1.0), wide.bfloat16().nan_to_num(0.0, 1.0, -1.0))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_relative_error_at_the_size_of_a_layer(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values, codes = nm_operand(300, 4096, n, m, torch.float32, generator)
    x = torch.randn(70, 4096, generator=generator)
    exact = x.double() @ to_dense(values.double(), codes, n, m).t()
    found = kernel.sparse_product(x, values, codes, n, m)
    assert float((found.double() - exact).norm() / exact.norm()) < 2e-6


class TestBits:
    """The result of a token does not depend on threads or on other tokens."""

    def test_any_number_of_threads(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(410, 1600, 2, 4, torch.float32, generator)
        for tokens in (1, 5, 150, 700):
            x = torch.randn(tokens, 1600, generator=generator)
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(kernel.sparse_product(x, values, codes, 2, 4))
            assert all(torch.equal(each, found[0]) for each in found)

    @pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
    def test_tokens_alone_and_together(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(130, 2100, 1, 4, dtype, generator)
        x = torch.randn(100, 2100, generator=generator).to(dtype)
        together = kernel.sparse_product(x, values, codes, 1, 4)
        for size in (1, 17, 33):
            alone = torch.cat([kernel.sparse_product(some, values, codes, 1, 4) for some in x.split(size)])
            assert torch.equal(alone, together)

    def test_one_token_of_any_stride(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(203, 1600, 2, 4, torch.float32, generator)
        strided = torch.randn(1600, 3, generator=generator).t()
        for x in (strided[1:2], strided[1:2].contiguous()):
            assert torch.equal(
                kernel.sparse_product(x, values, codes, 2, 4)[0],
                kernel.sparse_product(strided, values, codes, 2, 4)[1],
            )


class TestShapes:
    def test_wide_matrices(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for k in (1 << 15, (1 << 15) + 8):
            values, codes = nm_operand(3, k, 1, 8, torch.float32, generator)
            x = torch.randn(2, k, generator=generator)
            exact = x.double() @ dense_twin(values, codes, 1, 8).t()
            torch.testing.assert_close(nm_mm(x, values, codes, 1, 8, False).double(), exact, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("tokens", "rows", "k"), [(0, 8, 8), (3, 0, 8), (3, 8, 0), (0, 0, 0)])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_empty(self, tokens: int, rows: int, k: int, transposed: bool) -> None:
        values, codes = torch.ones(rows, k // 2), torch.full((rows, k // 8), 0b01000100, dtype=torch.uint8)
        x = torch.ones(tokens, rows if transposed else k)
        found = nm_mm(x, values, codes, 2, 4, transposed)
        assert found.shape == (tokens, k if transposed else rows) and not found.any()

    def test_operands_that_are_views(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(20, 48, 2, 4, torch.float32, generator)
        x = torch.randn(9, 48, generator=generator)
        views = torch.stack([values, values], 2)[..., 0], torch.stack([codes, codes], 2)[..., 1]
        assert not views[0].is_contiguous() and not views[1].is_contiguous()
        for transposed in (False, True):
            given_ = torch.randn(9, 20, generator=generator) if transposed else x
            expected = nm_mm(given_, values, codes, 2, 4, transposed)
            assert torch.equal(nm_mm(given_, *views, 2, 4, transposed), expected)

    def test_infinities_stay_where_they_are_read(self) -> None:
        # Columns 0 and 2 of every four.
        values, codes = torch.ones(40, 24), torch.full((40, 6), 0b10001000, dtype=torch.uint8)
        x = torch.ones(33, 48)
        x[5, 3], x[6, 4] = torch.inf, torch.nan
        found = kernel.sparse_product(x, values, codes, 2, 4)
        assert found[6].isnan().all()
        assert found[torch.arange(33) != 6].eq(24).all(), "column 3 is read by no row"

    def test_operands_stay_as_they_are(self) -> None:
        generator = torch.Generator().manual_seed(0)
        operands = torch.randn(9, 48, generator=generator), *nm_operand(20, 48, 2, 4, torch.float32, generator)
        before = [each.clone() for each in operands]
        nm_mm(*operands, 2, 4, False)
        assert all(map(torch.equal, operands, before))


class TestRefusals:
    """The kernel reads by address, so nothing wrong may reach it."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("tokens", [1, 3, 40])
    @pytest.mark.parametrize(("n", "m"), [(2, 3), (2, 8), (3, 20)])
    def test_a_code_that_is_m_or_more(self, dtype: torch.dtype, tokens: int, n: int, m: int) -> None:
        for row, byte in ((13, 1), (19, -1)):
            values, codes = nm_operand(20, 24 * m, n, m, dtype, torch.Generator().manual_seed(0))
            codes[row, byte] |= m if m == 20 else (m << 4 if m == 8 else 0b11000000)
            for transposed in (False, True):
                x = torch.ones(tokens, 20 if transposed else 24 * m, dtype=dtype)
                with pytest.raises(IndexError, match=f"outside of the {m} of its group"):
                    nm_mm(x, values, codes, n, m, transposed)

    def test_operands_that_do_not_fit(self) -> None:
        values, codes = nm_operand(20, 48, 2, 4, torch.float32, torch.Generator().manual_seed(0))
        for x, others, pattern, transposed in (
            (torch.ones(3, 44), (values, codes), (2, 4), False),
            (torch.ones(3, 48), (values, codes), (2, 4), True),
            (torch.ones(3, 48), (values, codes), (2, 8), False),
            (torch.ones(3, 48), (values, codes), (1, 4), False),
            (torch.ones(3, 48), (values, codes), (0, 4), False),
            (torch.ones(3, 48), (values, codes), (2, 257), False),
            (torch.ones(3, 48), (values[:, 2:], codes), (2, 4), False),
            (torch.ones(3, 48), (values, codes[:-1]), (2, 4), False),
            (torch.ones(3, 48), (values, codes[:, 1:]), (2, 4), False),
            (torch.ones(3, 48), (values, codes.short()), (2, 4), False),
            (torch.ones(3, 48).double(), (values, codes), (2, 4), False),
            (torch.ones(48), (values, codes), (2, 4), False),
        ):
            with pytest.raises(ValueError, match="give x"):
                nm_mm(x, *others, *pattern, transposed)


class TestDtypes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_result_has_the_dtype_of_the_input(self, dtype: torch.dtype, transposed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(33, 72, 2, 4, dtype, generator)
        x = torch.randn(9, 33 if transposed else 72, generator=generator).to(dtype)
        found = nm_mm(x, values, codes, 2, 4, transposed)
        dense = dense_twin(values, codes, 2, 4)
        exact = x.double() @ (dense if transposed else dense.t())
        assert found.dtype == dtype
        assert float((found.double() - exact).norm() / exact.norm()) < max(torch.finfo(dtype).eps, 1e-6)

    def test_autocast_changes_nothing(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values, codes = nm_operand(33, 72, 2, 4, torch.float32, generator)
        for transposed in (False, True):
            x = torch.randn(9, 33 if transposed else 72, generator=generator)
            expected = nm_mm(x, values, codes, 2, 4, transposed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = nm_mm(x, values, codes, 2, 4, transposed)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values, codes = nm_operand(13, 24, 2, 4, dtype, generator)
    x = torch.randn(13 if transposed else 24, 9, generator=generator).to(dtype).t()
    torch.library.opcheck(nm_mm, (x, values, codes, 2, 4, transposed))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is that of another processor")
def test_a_processor_with_narrower_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "load", functools.partial(native.load, flags=("-mno-avx512f",)))
    forget()
    generator = torch.Generator().manual_seed(0)
    try:
        for tokens in (3, 11, 32, 77):
            for dtype in kernel.DTYPES:
                values, codes = nm_operand(101, 1200, 2, 4, dtype, generator)
                x = torch.randn(tokens, 1200, generator=generator).to(dtype)
                dense = to_dense(values.double(), codes, 2, 4)
                found = kernel.sparse_product(x, values, codes, 2, 4)
                assert bool(((found.double() - x.double() @ dense.t()).abs() <= budget(x, dense)).all())
    finally:
        forget()


def test_without_a_compiler_it_says_so_once_and_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: str, *, name: str) -> None:
        raise NativeCompilerError("No C++ compiler.")

    values, codes = nm_operand(20, 48, 2, 4, torch.float32, torch.Generator().manual_seed(0))
    x = torch.ones(9, 48)
    expected = x.double() @ dense_twin(values, codes, 2, 4).t()
    monkeypatch.setattr(libraries, "load", refuse)
    forget()
    try:
        assert products.choose_kernel(9, 20, 48, 2, 4) == choice.Choice("dense", "there is no C++ compiler")
        for _ in range(2):
            found = nm_mm(x, values, codes, 2, 4, False)
        with pytest.raises(NativeCompilerError, match="dense_product"):
            kernel.sparse_product(x, values, codes, 2, 4)
    finally:
        forget()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert caplog.text.count("without compiled nm_mm.cpp") == caplog.text.count("without compiled places.cpp") == 1
