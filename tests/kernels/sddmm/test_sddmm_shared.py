import pytest
import torch
from torch._subclasses import FakeTensorMode

from sylva_compile.kernels.sddmm.op import sddmm_reference
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared

B, TOKENS = 8, 70
GRIDS = {
    "some": [[1, 0, 1], [0, 1, 0], [1, 1, 0]],
    "empty": [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    "full": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "one block": [[0, 0, 0], [0, 0, 1], [0, 0, 0]],
    "one row": [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    "one column": [[0, 1, 0], [0, 1, 0], [0, 1, 0]],
}


def arguments(*grids: str, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    widths = [17 + 3 * index for index in range(len(grids))]
    lhs = [torch.randn(TOKENS, width, generator=generator).to(dtype) for width in widths]
    positions = [torch.tensor(GRIDS[grid]).nonzero().t() for grid in grids]
    return lhs, torch.randn(TOKENS, 20, generator=generator).to(dtype), positions, B


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", list(GRIDS))
def test_each_weight_gets_what_it_would_get_alone(grid: str, dtype: torch.dtype) -> None:
    lhs, rhs, positions, b = arguments("some", grid, "full", dtype=dtype)
    found = sddmm_shared(lhs, rhs, positions, b)
    for left, at, result in zip(lhs, positions, found, strict=True):
        exact = sddmm_reference(left.double(), rhs.double(), at, b)
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-4)
        assert result.is_contiguous()


@pytest.mark.parametrize("grids", [("some",), ("some", "empty", "full"), ("one block", "one row")], ids=str)
def test_opcheck(grids: tuple[str, ...]) -> None:
    torch.library.opcheck(sddmm_shared, arguments(*grids))


def test_fake_says_what_the_real_one_returns() -> None:
    real = sddmm_shared(*arguments("some", "empty", dtype=torch.bfloat16))
    mode = FakeTensorMode()
    lhs, rhs, positions, b = arguments("some", "empty", dtype=torch.bfloat16)
    with mode:
        convert = mode.from_tensor
        fake = sddmm_shared([convert(t) for t in lhs], convert(rhs), [convert(t) for t in positions], b)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
