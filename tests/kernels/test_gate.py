import pytest
import torch
from torch import Tensor

from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared

POSITIONS = torch.tensor([[0, 1], [1, 0]])
LHS, RHS = torch.randn(5, 16), torch.randn(5, 20)


def both(gate: Tensor | None) -> list[Tensor]:
    """Return the results of every op that has a gate."""
    gathered = gather_blocks(LHS.t() @ RHS, POSITIONS, torch.arange(20), POSITIONS, 8, 1, gate)
    return [gathered, sddmm(LHS, RHS, POSITIONS, 8, gate), *sddmm_shared([LHS, LHS], RHS, [POSITIONS] * 2, 8, gate)]


def test_an_open_gate_changes_nothing() -> None:
    for found, expected in zip(both(torch.tensor(True)), both(None), strict=True):
        assert torch.equal(found, expected)
        assert bool(found.any())


def test_a_closed_gate_gives_zeros_without_looking_at_anything() -> None:
    for found, expected in zip(both(torch.tensor(False)), both(None), strict=True):
        assert torch.equal(found, torch.zeros_like(expected))
    outside = POSITIONS + 100
    with pytest.raises(IndexError):
        sddmm(LHS, RHS, outside, 8)
    assert not bool(sddmm(LHS, RHS, outside, 8, torch.tensor(False)).any())


@pytest.mark.parametrize("is_open", [False, True])
def test_opcheck(is_open: bool) -> None:
    gate = torch.tensor(is_open)
    torch.library.opcheck(sddmm, (LHS, RHS, POSITIONS, 8, gate))
    torch.library.opcheck(sddmm_shared, ([LHS, LHS], RHS, [POSITIONS] * 2, 8, gate))
    torch.library.opcheck(gather_blocks, (LHS.t() @ RHS, POSITIONS, torch.arange(20), POSITIONS, 8, 1, gate))
