"""Values moved between places, and the sampled product, against loops over elements and float64."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from nm_operands import PATTERNS, nm_operand
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.nm import libraries, places
from sylva_compile.kernels.nm_sample import nm_sample, nm_sample_reference
from sylva_compile.kernels.nm_transpose import OUTSIDE, nm_transpose, nm_transpose_reference

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values and columns of W, and places and slots of the second mask, of `rows` and `groups` groups of m."""
    values, columns = nm_operand(rows, groups * m, n, m, dtype, generator)
    _, kept = nm_operand(groups * m, rows, n, m, dtype, generator)
    slots = torch.full(kept.shape, OUTSIDE, dtype=torch.uint8)
    index = {(row, column): k for row, some in enumerate(columns.tolist()) for k, column in enumerate(some)}
    for column, some in enumerate(kept.tolist()):
        for k, row in enumerate(some):
            if (row, column) in index:
                slots[column, k] = index[row, column] % n
    return values, columns, kept, slots


@st.composite
def matrices(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, int]:
    n, m = draw(st.sampled_from(PATTERNS))
    groups, row_groups = draw(st.integers(1, 20)), draw(st.integers(1, 12) | st.sampled_from([40, 70]))
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return pruned_twice(row_groups * m, groups, n, m, draw(st.sampled_from(DTYPES)), generator), n, m


@given(matrices(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_transposed_values_are_those_of_both_masks(
    matrix: tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, int], wide: bool
) -> None:
    (values, columns, kept, slots), n, m = matrix
    exact = torch.zeros(kept.shape, dtype=torch.float64)
    dense = torch.zeros(values.shape[0], kept.shape[0], dtype=torch.float64)
    dense.scatter_(1, columns.long(), values.double())
    for column, some in enumerate(kept.tolist()):
        exact[column] = dense[some, column]
    for compute in (nm_transpose, nm_transpose_reference):
        found = compute(values, kept.int() if wide else kept, slots, n, m)
        assert found.dtype == values.dtype and found.is_contiguous()
        assert torch.equal(found.double(), exact)


@given(matrices(), st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_sampled_product_equals_the_float64_one(
    matrix: tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, int], tokens: int, wide: bool
) -> None:
    (values, columns, kept, _), _, _ = matrix
    generator = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(k, tokens, generator=generator).to(values.dtype).t() for k in (len(values), len(kept)))
    exact = (lhs.double().t() @ rhs.double()).gather(1, columns.long())
    magnitude = (lhs.double().abs().t() @ rhs.double().abs()).gather(1, columns.long())
    for compute in (nm_sample, nm_sample_reference):
        found = compute(lhs, rhs, columns.int() if wide else columns)
        assert found.dtype == values.dtype and found.is_contiguous()
        assert bool(((found.double() - exact).abs() <= 4 * torch.finfo(values.dtype).eps * magnitude).all())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    values, columns, kept, slots = pruned_twice(96, 30, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(50, 96, generator=generator), torch.randn(50, 120, generator=generator)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((nm_transpose(values, kept, slots, 2, 4), nm_sample(lhs, rhs, columns)))
    assert all(torch.equal(*pair) for each in found for pair in zip(each, found[0], strict=True))


def test_autocast_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    _, columns = nm_operand(8, 24, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(5, 24, generator=generator)
    expected = nm_sample(lhs, rhs, columns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nm_sample(lhs, rhs, columns), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values, columns, kept, slots = pruned_twice(8, 6, 2, 4, dtype, generator)
    torch.library.opcheck(nm_transpose, (values, kept, slots, 2, 4))
    lhs, rhs = torch.randn(8, 5, generator=generator).to(dtype).t(), torch.randn(5, 24, generator=generator).to(dtype)
    torch.library.opcheck(nm_sample, (lhs, rhs, columns))


def test_places_outside_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    values, columns, kept, slots = pruned_twice(8, 6, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(5, 24, generator=generator)
    for bad in (-1, 24):
        wrong = columns.clone()
        wrong[3, 5] = bad
        with pytest.raises(IndexError, match="outside of the 24"):
            nm_sample(lhs, rhs, wrong)
    slots[2, 1] = 0
    for bad in (-1, 8):
        wrong = kept.clone()
        wrong[2, 1] = bad
        with pytest.raises(IndexError, match="outside of the 8"):
            nm_transpose(values, wrong, slots, 2, 4)
    slots[2, 1] = 2
    with pytest.raises(IndexError, match="outside of the 8"):
        nm_transpose(values, kept, slots, 2, 4)


def test_operands_that_do_not_fit_are_refused() -> None:
    values, columns, kept, slots = pruned_twice(8, 6, 2, 4, torch.float32, torch.Generator().manual_seed(0))
    lhs, rhs = torch.ones(5, 8), torch.ones(5, 24)
    for wrong in ((lhs[1:], rhs, columns), (lhs[:, 1:], rhs, columns), (lhs, rhs.double(), columns)):
        with pytest.raises(ValueError, match="give operands of one dtype"):
            nm_sample(*wrong)
    with pytest.raises(ValueError, match="int16 or int32"):
        nm_sample(lhs, rhs, columns.long())
    for wrong in ((values, kept.long(), slots), (values, kept, slots[1:]), (values, kept, slots.int())):
        with pytest.raises(ValueError, match="a uint8 slot for each"):
            nm_transpose(*wrong, 2, 4)
    with pytest.raises(ValueError, match="give 1 values for every 4 of the 24"):
        nm_transpose(values, kept, slots, 1, 4)
    with pytest.raises(ValueError, match="give 2 values for every 4 of the 22"):
        nm_transpose(values[:, :11], kept[:22], slots[:22], 2, 4)


def test_without_a_compiler_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, *, name: str) -> None:
        raise NativeCompilerError("No C++ compiler.")

    generator = torch.Generator().manual_seed(0)
    values, columns, kept, slots = pruned_twice(8, 6, 2, 4, torch.float32, generator)
    lhs, rhs = torch.randn(5, 8, generator=generator), torch.randn(5, 24, generator=generator)
    monkeypatch.setattr(libraries, "load", refuse)
    libraries.places.cache_clear()
    try:
        assert torch.equal(nm_transpose(values, kept, slots, 2, 4), nm_transpose_reference(values, kept, slots, 2, 4))
        torch.testing.assert_close(nm_sample(lhs, rhs, columns), nm_sample_reference(lhs, rhs, columns))
    finally:
        libraries.places.cache_clear()
