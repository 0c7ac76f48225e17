import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sylva_compile.kernels.blocks import read_blocks
from sylva_compile.kernels.gather_blocks import gather_blocks

POSITIONS = torch.tensor([[0, 0, 1], [0, 2, 1]])
INPUT_CHANNELS = torch.arange(20)


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def gradient(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(13, 20, generator=torch.Generator().manual_seed(0)).to(request.param)


def test_opcheck(gradient: Tensor) -> None:
    torch.library.opcheck(gather_blocks, (gradient, POSITIONS, INPUT_CHANNELS, POSITIONS, 8, 1))


def test_opcheck_transposed_and_without_blocks() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    torch.library.opcheck(gather_blocks, (torch.randn(20, 13).t(), POSITIONS, INPUT_CHANNELS, POSITIONS, 8, 0))
    torch.library.opcheck(gather_blocks, (torch.randn(13, 20), nothing, INPUT_CHANNELS[:0], nothing, 8, 1))


def test_samples_the_gradient_widened(gradient: Tensor) -> None:
    found = gather_blocks(gradient, POSITIONS, INPUT_CHANNELS, POSITIONS, 8, 1)
    assert found.dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32)
    assert found.is_contiguous()
    assert torch.equal(found, read_blocks(gradient, POSITIONS, 8).to(found.dtype))
    assert torch.equal(found[1, :, :4], gradient[:8, 16:].to(found.dtype))
    assert not found[1, :, 4:].any()
    assert not found[2, 5:].any()


def test_only_the_gradient_and_the_positions_matter() -> None:
    gradient = torch.randn(13, 20)
    nonsense = torch.full((2, 3), 77)
    expected = gather_blocks(gradient, POSITIONS, INPUT_CHANNELS, POSITIONS, 8, 1)
    assert torch.equal(gather_blocks(gradient, POSITIONS, INPUT_CHANNELS[:1], nonsense, 8, 0), expected)


def test_fake_says_what_the_real_one_returns(gradient: Tensor) -> None:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (gradient, POSITIONS, INPUT_CHANNELS, POSITIONS)]
    with mode:
        fake = gather_blocks(*fakes, 8, 1)
    real = gather_blocks(gradient, POSITIONS, INPUT_CHANNELS, POSITIONS, 8, 1)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
