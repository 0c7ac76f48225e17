"""cuSPARSELt's products, with stand-ins for torch's operations: no GPU is needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nm_operands import dense_twin, nm_operand
from torch import Tensor

from sylva_compile import _torch
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.nm import choice, cuda, products
from sylva_compile.kernels.nm_mm import nm_mm_reference

GPU = torch.device("cuda")
SHAPE = (64, 128, 2, 4)  # rows, in_features, n, m


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in for a GPU of compute capability 9.0 with cuSPARSELt."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._algorithms.clear()
    choice.times.cache_clear()
    yield
    cuda._algorithms.clear()
    choice.times.cache_clear()


class StandIn:
    """cuSPARSELt's operations on the CPU: a compressed matrix is the dense one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searched: list[tuple[int, ...]] = []
        self.options: list[tuple[Any, ...]] = []
        monkeypatch.setattr(_torch, "cslt_compress", self.compress)
        monkeypatch.setattr(_torch, "cslt_sparse_mm", self.multiply)
        monkeypatch.setattr(_torch, "search_sparse_mm", self.search)

    def compress(self, dense: Tensor) -> Tensor:
        assert dense.dim() == 2 and dense.is_contiguous()
        groups = dense.unflatten(1, (-1, 4))
        kept = ((groups != 0).sum(2) <= 2) | groups.isnan().any(2)
        assert bool(kept.all()), "cuSPARSELt would drop values"
        return dense.clone()

    def multiply(
        self, compressed: Tensor, dense: Tensor, bias: None, alpha: None, dtype: None, transpose: bool, *options: int
    ) -> Tensor:
        assert transpose and dense.dim() == 2 and not dense.is_contiguous() and dense.t().is_contiguous()
        assert dense.shape[1] % 8 == 0 and compressed.dtype == dense.dtype
        self.options.append(options)
        return dense.t() @ compressed.t()

    def search(self, compressed: Tensor, dense: Tensor) -> tuple[int, int, int]:
        self.searched.append(tuple(dense.shape))
        return 7, 2, 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def matrix(dtype: torch.dtype = torch.bfloat16, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    return nm_operand(64, 128, n, m, dtype, torch.Generator().manual_seed(0))


class TestSupport:
    def test_a_hopper_gpu_can(self) -> None:
        assert cuda.missing(*SHAPE, torch.bfloat16, GPU) is None

    @pytest.mark.parametrize(
        ("shape", "dtype", "why"),
        [
            ((64, 128, 1, 4), torch.bfloat16, "2 of every 4"),
            ((64, 128, 4, 8), torch.bfloat16, "not 4 of 8"),
            (SHAPE, torch.float32, "not float32"),
            (SHAPE, torch.float64, "not float64"),
            ((72, 128, 2, 4), torch.float16, "multiples of 16, not 72 x 128"),
            ((64, 136, 2, 4), torch.float16, "multiples of 16, not 64 x 136"),
            ((0, 128, 2, 4), torch.float16, "multiples of 16"),
        ],
    )
    def test_shapes_and_dtypes_that_it_lacks(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, why: str
    ) -> None:
        said = cuda.missing(*shape, dtype, GPU)
        assert said is not None and why in said

    def test_an_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert cuda.missing(*SHAPE, torch.float16, GPU) == "cuSPARSELt needs compute capability 8.0, this GPU has 7.5"

    def test_a_build_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
        assert cuda.missing(*SHAPE, torch.float16, GPU) == "torch was built without cuSPARSELt"
        assert cuda.version() is None


class TestChoice:
    @pytest.mark.parametrize(("sparse", "dense", "expected"), [(1.0, 1.2, "cusparselt"), (1.2, 1.0, "dense")])
    def test_by_measurement(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float, expected: str
    ) -> None:
        monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(choice, "measure", lambda product: {"sparse": sparse, "dense": dense})
        assert choice.choose_kernel(4096, *SHAPE, torch.bfloat16, GPU).kernel == expected

    def test_nothing_is_measured_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "measure", lambda product: pytest.fail("measured"))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choice.choose_kernel(4096, *SHAPE, torch.bfloat16, GPU).kernel == "dense"

    def test_the_class_of_a_large_product_is_large(self) -> None:
        product = choice.Product(5000, 11008, 4096, 2, 4, torch.bfloat16, GPU).class_of()
        assert (product.tokens, product.rows) == (8192, 11008)


class TestProducts:
    """The products themselves, on the CPU through the stand-ins."""

    @pytest.mark.parametrize("tokens", [0, 1, 7, 8, 13])
    @pytest.mark.parametrize("pattern", [(2, 4), (1, 2)])
    def test_equals_the_dense_product(self, stand_in: StandIn, tokens: int, pattern: tuple[int, int]) -> None:
        values, codes = matrix(torch.float16, *pattern)
        x = torch.randn(128, tokens, generator=torch.Generator().manual_seed(1)).half().t()
        packed, no_codes = cuda.compress(values, codes, *pattern)
        assert packed.shape[0] == 64 and no_codes.shape == (64, 0)
        exact = x.double() @ dense_twin(values, codes, *pattern).t()
        for found in (
            cuda.packed_and_multiplied(x, values, codes, *pattern),
            products.nm_mm_cuda(x, packed, no_codes, *pattern, False),
        ):
            assert found.shape == (tokens, 64) and found.is_contiguous()
            torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)

    def test_another_pattern_is_multiplied_as_a_dense_matrix(self, stand_in: StandIn) -> None:
        # As many values as at 2:4, but 4 of 8: cuSPARSELt would drop some of them.
        values, codes = matrix(n=4, m=8)
        x = torch.ones(8, 128, dtype=torch.bfloat16)
        found = products.nm_mm_cuda(x, values, codes, 4, 8, False)
        torch.testing.assert_close(found, nm_mm_reference(x, values, codes, 4, 8, False))
        assert not stand_in.options
        with pytest.raises(ArgumentError, match="n=2, m=4"):
            cuda.compress(values, codes, 4, 8)

    def test_an_algorithm_is_searched_once_for_each_class_of_shapes(self, stand_in: StandIn) -> None:
        values, codes = matrix()
        for tokens in (13, 16, 24, 9, 32):
            cuda.packed_and_multiplied(torch.ones(tokens, 128, dtype=torch.bfloat16), values, codes, 2, 4)
        assert stand_in.searched == [(128, 16), (128, 24)]
        assert stand_in.options == [(7, 2, 1)] * 5

    def test_no_search_while_a_graph_is_captured(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        cuda.packed_and_multiplied(torch.ones(8, 128, dtype=torch.bfloat16), *matrix(), 2, 4)
        assert stand_in.options == [cuda.DEFAULT_ALGORITHM] and not stand_in.searched

    @pytest.mark.parametrize("kernel", ["cusparselt", "dense"])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_the_op_runs_what_is_chosen(
        self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, kernel: Any, transposed: bool
    ) -> None:
        def chosen(*shape: Any, transposed: bool) -> choice.Choice:
            return choice.Choice("dense" if transposed else kernel, "")

        monkeypatch.setattr(products, "choose_kernel", chosen)
        values, codes = matrix()
        x = torch.ones(8, 64 if transposed else 128, dtype=torch.bfloat16)
        found = products.nm_mm_cuda(x, values, codes, 2, 4, transposed)
        torch.testing.assert_close(found, nm_mm_reference(x, values, codes, 2, 4, transposed))
        assert bool(stand_in.options) == (kernel == "cusparselt" and not transposed)

    def test_an_input_of_another_dtype_is_refused(self, stand_in: StandIn) -> None:
        packed = cuda.compress(*matrix(), 2, 4)
        with pytest.raises(ArgumentError, match=r"give x \[tokens, columns\] of torch.bfloat16"):
            products.nm_mm_cuda(torch.ones(8, 128), *packed, 2, 4, False)

    def test_a_compressed_matrix_has_no_transposed_product(self, stand_in: StandIn) -> None:
        packed = cuda.compress(*matrix(), 2, 4)
        with pytest.raises(ArgumentError, match="give its values and codes"):
            products.nm_mm_cuda(torch.ones(8, 64, dtype=torch.bfloat16), *packed, 2, 4, True)
        with pytest.raises(ArgumentError, match="give x"):
            products.nm_mm_cpu(torch.ones(8, 128, dtype=torch.bfloat16), *packed, 2, 4, False)
