import pytest
import torch

from sylva_compile.kernels.probe import probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(probe, (torch.randn(3, 4).to(dtype), torch.zeros(())))


@pytest.mark.parametrize(("value", "wanted"), [(0.0, 0.0), (-1e-30, 1.0), (float("nan"), 1.0)])
def test_one_where_a_dense_gradient_has_values(value: float, wanted: float) -> None:
    gradient = torch.zeros(3, 4)
    gradient[2, 3] = value
    found = probe(gradient, torch.zeros((), dtype=torch.float64))
    assert (found.shape, found.dtype, found.item()) == ((), torch.float64, wanted)
