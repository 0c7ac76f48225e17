"""Slow, simple reference implementations, which the tests compare with the fast ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sylva_compile import BlockMask, Masks


def blocks_by_loops(matrix: Tensor, mask: BlockMask) -> Tensor:
    """Return the blocks of `matrix [m, n]`, `[nnz, b, b]`, cut out one by one; elements beyond the edge are zero."""
    b, (m, n) = mask.block_size, mask.shape
    out = matrix.new_zeros(mask.nnz, b, b)
    for k, (row, col) in enumerate(zip(mask.rows.tolist(), mask.cols.tolist(), strict=True)):
        piece = matrix[row * b : min(m, (row + 1) * b), col * b : min(n, (col + 1) * b)]
        out[k, : piece.shape[0], : piece.shape[1]] = piece
    return out


def random_masks(model: nn.Module, names: list[str], block_size: int, share: float) -> Masks:
    """Make masks with a random `share` of each weight's blocks."""
    maps = {}
    for name in names:
        m, n = model.get_parameter(name).shape
        maps[name] = torch.rand(-(-m // block_size), -(-n // block_size)) < share
    return Masks.from_block_maps(model, maps, block_size)


def dense_gradients(model: nn.Module, loss: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return the dense gradients of named weights of a model that is not embedded."""
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True))


def block_gradients(model: nn.Module, masks: Mapping[str, BlockMask]) -> dict[str, Tensor]:
    """Return the gradients of an embedded model's blocks."""
    found = {}
    for name in masks:
        gradient = model.get_parameter(name + "_blocks").grad
        assert gradient is not None, f"{name} has no gradient"
        found[name] = gradient
    return found


def assert_invariant(model: nn.Module, masks: Mapping[str, BlockMask]) -> None:
    """Assert that dense weights equal the rounded blocks, bit for bit."""
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        blocks = model.get_parameter(name + "_blocks").detach()
        inside = blocks_by_loops(torch.ones_like(weight), mask).bool()
        assert torch.equal(blocks_by_loops(weight, mask)[inside], blocks.to(weight.dtype)[inside]), name
