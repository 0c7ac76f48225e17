"""Values moved between places, and the sampled product, against loops over elements and float64."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from nm_operands import PATTERNS, columns_twin, dense_twin, nm_operand
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.nm import libraries, places
from sylva_compile.kernels.nm_sample import nm_sample, nm_sample_reference
from sylva_compile.kernels.nm_transpose import nm_transpose, nm_transpose_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def _outputs_start_as_nan() -> Iterator[None]:
    """Elements that a kernel leaves unwritten are NaN; small work uses all threads too."""
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "PRODUCTS_PER_THREAD", 1)
        patch.setattr(libraries, "MOVES_PER_THREAD", 1)
        # Products of these sizes are cut into parts.
        patch.setattr(places, "_CHUNK", 300)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _threads_as_found() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pruned_twice(
    rows: int, groups: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and codes of W, and codes of the second mask, of `rows` and `groups` groups of m."""
    values, codes = nm_operand(rows, groups * m, n, m, dtype, generator)
    _, second = nm_operand(groups * m, rows, n, m, dtype, generator)
    return values, codes, second


@st.composite
def matrices(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    n, m = draw(st.sampled_from([*PATTERNS, (3, 4), (4, 8), (3, 5), (5, 20)]))
    groups, row_groups = draw(st.integers(1, 20)), draw(st.integers(1, 12) | st.sampled_from([40, 70]))
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return pruned_twice(row_groups * m, groups, n, m, draw(st.sampled_from(DTYPES)), generator), n, m


@given(matrices())
@settings(deadline=None, max_examples=40)
def test_the_transposed_values_are_those_of_both_masks(matrix: tuple[tuple[Tensor, Tensor, Tensor], int, int]) -> None:
    (values, codes, second), n, m = matrix
    dense = dense_twin(values, codes, n, m)
    places = columns_twin(second, values.shape[0] // m * n, n, m)
    exact = torch.stack([dense[some, column] for column, some in enumerate(places)])
    for compute in (nm_transpose, nm_transpose_reference):
        found = compute(values, codes, second, n, m)
        assert found.dtype == values.dtype and found.is_contiguous()
        assert torch.equal(found.double(), exact)


@given(matrices(), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_the_sampled_product_equals_the_float64_one(
    matrix: tuple[tuple[Tensor, Tensor, Tensor], int, int], tokens: int
) -> None:
    (values, codes, second), n, m = matrix
    generator = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(k, tokens, generator=generator).to(values.dtype).t() for k in (len(values), len(second)))
    columns = torch.tensor(columns_twin(codes, values.shape[1], n, m))
    exact = (lhs.double().t() @ rhs.double()).gather(1, columns)
    magnitude = (lhs.double().abs().t() @ rhs.double().abs()).gather(1, columns)
    for compute in (nm_sample, nm_sample_reference):
        found = compute(lhs, rhs, codes, n, m)
        assert found.dtype == values.dtype and found.is_contiguous()
        assert bool(((found.double() - exact).abs() <= 4 * torch.finfo(values.dtype).eps * magnitude).all())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    values, codes, second = pruned_twice(96, 30, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(50, 96, generator=generator), torch.randn(50, 120, generator=generator)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((nm_transpose(values, codes, second, 2, 4), nm_sample(lhs, rhs, codes, 2, 4)))
    assert all(torch.equal(*pair) for each in found for pair in zip(each, found[0], strict=True))


def test_autocast_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    _, codes = nm_operand(8, 24, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(5, 24, generator=generator)
    expected = nm_sample(lhs, rhs, codes, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nm_sample(lhs, rhs, codes, 2, 4), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values, codes, second = pruned_twice(8, 6, 2, 4, dtype, generator)
    torch.library.opcheck(nm_transpose, (values, codes, second, 2, 4))
    lhs, rhs = torch.randn(8, 5, generator=generator).to(dtype).t(), torch.randn(5, 24, generator=generator).to(dtype)
    torch.library.opcheck(nm_sample, (lhs, rhs, codes, 2, 4))


def test_codes_outside_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    values, codes, second = pruned_twice(16, 6, 2, 8, torch.float32, generator)
    lhs, rhs = torch.randn(5, 16, generator=generator), torch.randn(5, 48, generator=generator)
    for row, byte, bad in ((3, 5, 0x80), (15, 0, 0x08)):
        wrong = codes.clone()
        wrong[row, byte] |= bad
        with pytest.raises(IndexError, match="outside of the 8 of its group"):
            nm_sample(lhs, rhs, wrong, 2, 8)
        with pytest.raises(IndexError, match="outside of the 8 of its group"):
            nm_transpose(values, wrong, second, 2, 8)
    second[47, 1] |= 0x80
    with pytest.raises(IndexError, match="outside of the 8 of its group"):
        nm_transpose(values, codes, second, 2, 8)


def test_operands_that_do_not_fit_are_refused() -> None:
    values, codes, second = pruned_twice(8, 6, 2, 4, torch.float32, torch.Generator().manual_seed(0))
    lhs, rhs = torch.ones(5, 8), torch.ones(5, 24)
    for wrong in (
        (lhs[1:], rhs, codes),
        (lhs[:, 1:], rhs, codes),
        (lhs, rhs.double(), codes),
        (lhs, rhs[:, 1:], codes),
    ):
        with pytest.raises(ValueError, match="give operands of one dtype"):
            nm_sample(*wrong, 2, 4)
    with pytest.raises(ValueError, match="the uint8 codes of 2 in every 4"):
        nm_sample(lhs, rhs, codes.long(), 2, 4)
    for other in ((values, codes.short(), second), (values, codes, second[:, :0]), (values[:6], codes[:6], second)):
        with pytest.raises(ValueError, match="uint8 codes of both"):
            nm_transpose(*other, 2, 4)
    with pytest.raises(ValueError, match="give 1 values for every 4 of the 24"):
        nm_transpose(values, codes, second, 1, 4)
    with pytest.raises(ValueError, match="give 2 values for every 4 of the 20"):
        nm_transpose(values, codes, second[:20], 2, 4)


def test_without_a_compiler_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, *, name: str) -> None:
        raise NativeCompilerError("No C++ compiler.")

    generator = torch.Generator().manual_seed(0)
    values, codes, second = pruned_twice(8, 6, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(5, 24, generator=generator)
    monkeypatch.setattr(libraries, "load", refuse)
    libraries.places.cache_clear()
    try:
        assert torch.equal(
            nm_transpose(values, codes, second, 2, 4), nm_transpose_reference(values, codes, second, 2, 4)
        )
        torch.testing.assert_close(nm_sample(lhs, rhs, codes, 2, 4), nm_sample_reference(lhs, rhs, codes, 2, 4))
    finally:
        libraries.places.cache_clear()
