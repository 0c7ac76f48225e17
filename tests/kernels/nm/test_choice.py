"""Which kernel computes a product: the rules, and the measurement that is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sylva_compile.kernels.nm import choice, cpu
from sylva_compile.kernels.nm.choice import Product, choose_kernel, measure, operands
from sylva_compile.nm.pattern import check_codes

CPU = torch.device("cpu")
LARGE = (256, 768, 768, 2, 4)


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    choice.times.cache_clear()
    yield
    choice.times.cache_clear()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which measurements are kept; the compiled kernel is loaded already."""
    assert cpu.is_compiled()
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float) -> list[Product]:
    """Let the measurement find these seconds; return the list of products that are measured."""
    measured: list[Product] = []

    def found(product: Product) -> dict[str, float]:
        measured.append(product)
        return {"sparse": sparse, "dense": dense}

    monkeypatch.setattr(choice, "measure", found)
    return measured


class TestRules:
    """Choices that need no measurement."""

    @pytest.fixture(autouse=True)
    def _nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "measure", lambda product: pytest.fail(f"measured {product}"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
    def test_other_dtypes_are_dense_on_the_cpu(self, dtype: torch.dtype) -> None:
        found = choose_kernel(*LARGE, dtype)
        assert found.kernel == "dense" and str(dtype).removeprefix("torch.") in found.why

    def test_the_transposed_product_is_dense(self) -> None:
        assert choose_kernel(*LARGE, transposed=True).kernel == "dense"

    def test_small_products_are_sparse(self) -> None:
        assert choose_kernel(1, 768, 768, 2, 4).kernel == "sparse"
        assert choose_kernel(0, 768, 0, 2, 4).kernel == "sparse"

    def test_other_devices_are_dense(self) -> None:
        assert choose_kernel(*LARGE, device="meta").kernel == "dense"

    def test_deterministic_algorithms_measure_nothing(self) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            assert choose_kernel(*LARGE).kernel == "sparse"
        finally:
            torch.use_deterministic_algorithms(False)


class TestMeasurement:
    @pytest.mark.parametrize(("sparse", "dense", "expected"), [(1, 2, "sparse"), (2, 1, "dense"), (1, 0.97, "sparse")])
    def test_the_faster_one_wins_and_near_ties_are_sparse(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float, expected: str
    ) -> None:
        pretend(monkeypatch, sparse, dense)
        found = choose_kernel(*LARGE)
        assert found.kernel == expected
        assert f"sparse {sparse * 1e3:.3g} ms, dense {dense * 1e3:.3g} ms" in found.why

    def test_a_class_is_measured_once_on_a_machine(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = pretend(monkeypatch, 1.0, 2.0)
        for tokens in (200, 256, 5000, 129):
            choose_kernel(tokens, 768, 768, 2, 4)
        assert measured == [Product(256, 768, 768, 2, 4, torch.float32, CPU)]
        # Another process finds the times on disk, whatever it would measure itself.
        choice.times.cache_clear()
        again = pretend(monkeypatch, 2.0, 1.0)
        assert choose_kernel(*LARGE).kernel == "sparse" and not again

    def test_classes(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = pretend(monkeypatch, 1.0, 2.0)
        choose_kernel(60, 8000, 768, 2, 4)
        choose_kernel(60, 8000, 1536, 2, 4)
        assert [(each.tokens, each.rows, each.in_features) for each in measured] == [(64, 1024, 768), (64, 1024, 1536)]
        with torch.device("meta"):
            choose_kernel(60, 8000, 768, 1, 2)
        assert len(measured) == 3

    def test_another_number_of_threads_is_another_class(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = pretend(monkeypatch, 1.0, 2.0)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                choose_kernel(*LARGE)
        finally:
            torch.set_num_threads(before)
        assert len(measured) == 2

    def test_without_a_place_on_disk_it_is_measured_in_each_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(key: str, suffix: str, build: object) -> Path:
            raise OSError("disk full")

        monkeypatch.setattr(choice, "cached", full)
        measured = pretend(monkeypatch, 2.0, 1.0)
        assert [choose_kernel(*LARGE).kernel for _ in range(2)] == ["dense", "dense"]
        assert len(measured) == 1

    @pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
    def test_both_kernels_are_run_and_no_random_state_is_touched(self, dtype: torch.dtype) -> None:
        before = torch.get_rng_state()
        found = measure(Product(40, 50, 64, 2, 4, dtype, CPU))
        assert set(found) == {"sparse", "dense"} and all(0 < seconds < 60 for seconds in found.values())
        assert torch.equal(torch.get_rng_state(), before)

    def test_autocast_is_off_while_it_measures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dtypes = []

        def product(*operands: Any) -> torch.Tensor:
            dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return right(*operands)

        right = cpu.dense_product
        monkeypatch.setattr(cpu, "dense_product", product)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            measure(Product(4, 8, 8, 2, 4, torch.float32, CPU))
        assert set(dtypes) == {torch.float32}

    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (7, 8), (1, 256)])
    def test_codes_of_the_made_up_matrix_are_as_the_op_wants_them(self, n: int, m: int) -> None:
        x, values, codes = operands(Product(3, 50, 5 * m, n, m, torch.float32, CPU))
        assert x.shape == (3, 5 * m) and values.shape == (50, 5 * n)
        check_codes(codes, 50, 5 * m, n, m)
